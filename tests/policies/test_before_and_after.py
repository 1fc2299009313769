"""Before a loss: warnings and slow ranks. After it: growing back, rearming."""

import numpy as np
import pytest

from resilient_moe import recovery as rm
from tests.policies.ask import only, recovered
from tests.recovery import cases

SURVIVORS = (
  "mesh_shrink",
  "replica_promotion",
  "kv_restore",
  "mask_experts",
  "retry",
  "spare",
)


@pytest.mark.parametrize("name", SURVIVORS)
def test_a_warning_drains_the_rank_while_it_lives(name):
  view, plan = recovered(name, rm.RanksLeaving((3,), 2.0))
  for action in only(plan.resume, rm.CopyExperts):
    assert action.tier == rm.Tier.PEER
    assert {m.source for m in action.moves} == {3}
  (hand_over,) = only(plan.resume, rm.RestoreKV)
  assert hand_over.tier == rm.Tier.PEER
  assert not only(plan.resume, rm.Fence)
  assert plan.repair[0] == rm.Fence((3,))
  after = rm.advance_all(view, rm.ordered(plan.resume))
  live = np.array_equal(after.requests.kv_tokens, view.requests.kv_tokens)
  assert live, "nothing is prefilled again"


@pytest.mark.parametrize("name", SURVIVORS)
def test_stragglers_are_tolerated_unless_asked(name):
  slow = rm.Straggler(2, 4.0)
  _, answer = recovered(name, slow)
  assert "rank 2 is 4.0 times slower" in answer.reason
  view, plan = recovered(name, slow, drain_stragglers=True)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert 2 not in after.mesh


def test_replacements_take_their_share_and_rejoin():
  view, plan = recovered("mesh_shrink", rm.RanksLost((3, 5)), replace=True)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  grown = rm.advance_all(after, rm.ordered(plan.repair))
  assert grown.mesh.tolist() == list(range(8))
  assert rm.servable(grown) is None
  serving = np.bincount(grown.table.entries[:, :, 0].ravel(), minlength=8)
  assert serving.tolist() == [2] * 8


def test_a_replacement_never_holds_an_expert_twice():
  view, plan = recovered("replica_promotion", replace=True)
  actions = rm.ordered(plan.resume) + rm.ordered(plan.repair)
  grown = rm.advance_all(view, actions)
  held = grown.slots[3][grown.slots[3] >= 0].tolist()
  assert len(held) == len(set(held)) == 4


@pytest.mark.parametrize(
  ("name", "copies"),
  [("kv_restore", 2), ("mesh_shrink", 1), ("mask_experts", 1)],
)
def test_hosts_lost_in_turn_leave_no_trace_once_replaced(name, copies):
  # Donors keep shadows, which must neither count as copies nor use room up.
  policy = rm.load(name, replace=True)
  view = cases.serving(policy, "16x64-racks")
  for host in (2, 5, 0, 2, 7, 3, 6, 1, 4):
    struck = tuple(np.flatnonzero(view.host == host).tolist())
    view = rm.lose(view, struck)
    plan = rm.recover_checked(policy, view, rm.RanksLost(struck))
    for part in (plan.resume, plan.repair):
      view = rm.advance_all(view, rm.ordered(part))
    on = view.table.entries[:, :, 0]
    assert not view.masked.any()
    assert (view.table.copies() == copies).all()
    assert np.bincount(on[on >= 0]).tolist() == [4 * copies] * 16
    # Two of 64 found no slot elsewhere while a host was away.
    if copies == 2:
      assert (view.host[on[:, 0]] == view.host[on[:, 1]]).sum() <= 2


def test_rearming_has_the_next_spare_stand_in_for_each_rank():
  view, plan = recovered("spare", rearm=True, spares=2)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  repaired = rm.advance_all(after, rm.ordered(plan.repair))
  second = rm.recover_checked(
    rm.load("spare", spares=2), repaired, rm.RanksLost((5,))
  )
  (fetch,) = only(second.resume, rm.FetchExecutable)
  assert fetch.absent in repaired.ready


def test_rearming_makes_the_next_single_losses_ready():
  view, plan = recovered("mesh_shrink", rearm=True)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  repaired = rm.advance_all(after, rm.ordered(plan.repair))
  for rank in repaired.mesh.tolist():
    assert frozenset({3, rank}) in repaired.ready
