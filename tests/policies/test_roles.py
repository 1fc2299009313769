"""Attention ranks that become expert ranks, and go back."""

import dataclasses

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.recovery.growth import back_to_attention
from tests.policies.ask import done, kinds, on, only, recovered
from tests.recovery import cases

FREE = "3+5x16"  # 4 slots a rank without reserve: some stay free
FULL = "2+4x8"  # every slot is taken without reserve


def uneven(policy, size, kept):
  """The policy's start, with so many requests on each attention rank."""
  view = cases.serving(policy, size)
  ranks = np.repeat(np.arange(len(kept)), kept).astype(np.int32)
  index = np.arange(len(ranks))
  requests = dataclasses.replace(
    view.requests,
    request_id=tuple(view.requests.request_id[i] for i in index),
    **{
      f.name: getattr(view.requests, f.name)[index]
      for f in dataclasses.fields(view.requests)[1:]
    },
  )
  return dataclasses.replace(
    view, requests=dataclasses.replace(requests, rank=ranks)
  )


@pytest.mark.parametrize(
  ("kept", "switches"), [((3, 1), 1), ((1, 3), 0), ((2, 2), 0)]
)
def test_the_attention_rank_with_the_fewest_requests_is_switched(
  kept, switches
):
  policy = rm.load("role_switch")
  lost = rm.RanksLost((2,))
  view = cases.after(uneven(policy, FULL, kept), lost)
  plan = rm.recover_checked(policy, view, lost)
  (switch,) = only(plan.resume, rm.SwitchRole)
  assert switch == rm.SwitchRole(switches, rm.Role.EXPERT)
  (hand_over,) = only(plan.resume, rm.RestoreKV)
  assert hand_over.tier == rm.Tier.PEER
  assert set(hand_over.requests) == on(view, switches)
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert {m.rank for m in copy.moves} == {switches}
  assert {m.expert for m in copy.moves} == {0, 1}
  after, _ = done(view, plan)
  kv = after.requests.kv_tokens
  assert (kv == view.requests.kv_tokens).all(), "nothing is prefilled again"
  steps = kinds(rm.ordered(plan.resume))
  assert steps.index(rm.SwitchRole) < steps.index(rm.CopyExperts)
  assert steps.index(rm.CopyExperts) < steps.index(rm.RemapExperts)


def test_no_role_is_switched_while_slots_are_free():
  _, plan = recovered("role_switch", rm.RanksLost((3,)), FREE)
  assert not only(plan.resume, rm.SwitchRole)


def test_a_checkpoint_on_a_rank_that_switches_is_still_restored():
  """The neighbour of the lost attention rank leaves attention at once."""
  policy = rm.compose(
    "both", rm.axes.role_switch(), rm.axes.nearest(), rm.axes.restore_kv()
  )
  lost = rm.RanksLost((0, 3, 4))
  view = cases.after(cases.serving(policy, FREE), lost)
  plan = rm.recover_checked(policy, view, lost)
  (switch,) = only(plan.resume, rm.SwitchRole)
  holders = view.requests.checkpoint_rank[view.requests.on([0])]
  assert set(holders.tolist()) == {1} == {switch.rank}
  restored = {n for a in only(plan.resume, rm.RestoreKV) for n in a.requests}
  assert restored <= on(view, 0) | on(view, 1)
  assert restored & on(view, 0)


@pytest.mark.parametrize(
  ("lost", "size"), [((2,), FULL), ((3, 4), FREE), ((3, 6), FREE)]
)
@pytest.mark.parametrize("leaving", [False, True])
def test_with_a_replacement_the_switched_rank_attends_again(
  lost, size, leaving
):
  failure = rm.RanksLeaving(lost, 2.0) if leaving else rm.RanksLost(lost)
  view, plan = recovered("role_switch", failure, size, replace=True)
  after, repaired = done(view, plan)
  (switch,) = only(plan.resume, rm.SwitchRole)
  back = rm.ordered(plan.repair)[-1]
  assert back == rm.SwitchRole(switch.rank, rm.Role.ATTENTION)
  assert after.role[switch.rank] == rm.Role.EXPERT
  assert (repaired.role == repaired.home).all()
  assert (repaired.slots[switch.rank] == -1).all()
  assert rm.servable(repaired) is None
  assert repaired.mesh.tolist() == list(view.launched)


def test_a_lost_switched_rank_comes_back_as_what_it_was():
  policy = rm.load("role_switch", replace=True)
  first = rm.RanksLost((2,))
  view = cases.after(cases.serving(policy, FULL), first)
  plan = rm.recover_checked(policy, view, first)
  (switch,) = only(plan.resume, rm.SwitchRole)
  view = rm.advance_all(view, rm.ordered(plan.resume))
  # Its replacement was under way when the switched rank is lost too.
  view = rm.advance(view, rm.ordered(plan.repair)[0])
  again = rm.RanksLost((switch.rank,))
  view = rm.advance(cases.after(view, again), rm.Fence(again.ranks))
  launched = rm.advance(view, rm.LaunchRank(switch.rank))
  assert launched.role[switch.rank] == rm.Role.ATTENTION


def test_a_restart_gives_everybody_the_first_role():
  policy = rm.first_feasible(rm.load("role_switch"), rm.load("restart"))
  view = cases.serving(policy, FREE)
  lost = rm.RanksLost((3, 4))
  view = cases.after(view, lost)
  plan = rm.recover_checked(rm.load("role_switch"), view, lost)
  view = rm.advance_all(view, rm.ordered(plan.resume))
  assert (view.role != view.home).any()
  again = rm.RanksLost((5, 6))
  view = cases.after(view, again)
  plan = rm.recover_checked(rm.load("restart"), view, again)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert (after.role == after.home).all()
  assert set(after.table.entries[:, 0, 0].tolist()) == {7}
  attending = rm.RestartInstance((0, 1), cache=False)
  holding = rm.RestartInstance((7,), cache=False)
  for action, work in ((attending, "experts"), (holding, "requests")):
    with pytest.raises(rm.IllegalPlan, match=f"may hold {work}"):
      rm.advance(view, action)


def test_a_restart_lets_a_switched_rank_attend_if_nobody_else_does():
  policy = rm.load("role_switch")
  lost = rm.RanksLost((2,))
  view = cases.after(cases.serving(policy, FULL), lost)
  plan = rm.recover_checked(policy, view, lost)
  view = rm.advance_all(view, rm.ordered(plan.resume))
  (switch,) = only(plan.resume, rm.SwitchRole)
  last = rm.RanksLost((1 - switch.rank,))
  view = cases.after(view, last)
  assert isinstance(rm.recover_checked(policy, view, last), rm.Infeasible)
  plan = rm.recover_checked(rm.load("restart"), view, last)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert after.role[switch.rank] == rm.Role.ATTENTION
  assert rm.price_plan(plan, view, rm.THIS_MACHINE).resume.seconds > 0


def test_a_rank_stays_switched_if_a_serving_copy_had_to_make_room():
  view = cases.serving(rm.load("role_switch"), FULL)
  waits = rm.Requeue(view.requests.request_id)
  view = rm.advance_all(view, [rm.SwitchRole(1, rm.Role.EXPERT), waits])
  taken = view.slots[2, 0]  # moves to rank 1, and a copy of 2 into its place
  moves = (rm.Move(int(taken), 1, 0, 2),), (rm.Move(2, 2, 0, 3),)
  view = rm.advance_all(view, [rm.CopyExperts(m, rm.Tier.PEER) for m in moves])
  before, after = (view.table.entries.copy() for _ in range(2))
  before[taken, 0] = after[taken, 0] = 1, 0
  after[2, 0] = 2, 0  # its first place, (3, 0), is a shadow then
  views = [
    rm.advance(view, rm.RemapExperts(rm.RoutingTable(entries)))
    for entries in (before, after)
  ]
  assert kinds(back_to_attention(views[1], views[1])) == [
    rm.CopyExperts, rm.RemapExperts, rm.SwitchRole,
  ]  # fmt: skip
  assert back_to_attention(views[1], views[0]) == ()
