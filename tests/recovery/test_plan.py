"""Derived order and the refusal of illegal plans."""

import dataclasses
import itertools

import numpy as np
import pytest

from resilient_moe import recovery as rm
from tests.recovery import cases

FENCE = rm.Fence((3,))
MESH = rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7))
FETCH = rm.FetchExecutable(frozenset({3}))


def lost_view(policy="mesh_shrink"):
  """Rank 3 of 8 is gone; experts 6 and 7, requests r0003 and r0011 with it."""
  return rm.lose(cases.serving(rm.load(policy), "8x16"), (3,))


def good_plan(view):
  return rm.load("mesh_shrink").recover(view, rm.RanksLost((3,)))


def replaced(plan, kind, action):
  """`plan` with `action` in place of its action of type `kind`."""
  resume = tuple(action if type(a) is kind else a for a in plan.resume)
  return dataclasses.replace(plan, resume=resume)


def test_order_is_the_same_however_the_actions_are_listed():
  view = lost_view()
  resume = good_plan(view).resume
  assert [type(a) for a in resume[:3]] == [
    rm.Fence,
    rm.RebuildMesh,
    rm.FetchExecutable,
  ]
  for listed in itertools.permutations(resume):
    done = [type(a) for a in rm.ordered(listed)]
    for first, then in (
      (rm.Fence, rm.RebuildMesh),
      (rm.Fence, rm.CopyExperts),
      (rm.RebuildMesh, rm.FetchExecutable),
      (rm.RebuildMesh, rm.RecomputePrefix),
      (rm.CopyExperts, rm.RemapExperts),
      (rm.RebuildMesh, rm.RemapExperts),
    ):
      assert done.index(first) < done.index(then)
    rm.check(rm.Plan(listed, (), good_plan(view).paused), view)


def test_two_writers_keep_the_listed_order():
  one = rm.CopyExperts((rm.Move(1, 0, 2),), rm.Tier.HOST)
  two = rm.CopyExperts((rm.Move(2, 0, 2),), rm.Tier.HOST)
  assert rm.ordered((one, two)) == (one, two)
  assert rm.ordered((two, one)) == (two, one)


def test_what_depends_on_nothing_keeps_its_place():
  queue, switch = rm.Requeue(("a",)), rm.SwitchRole(0, rm.Role.EXPERT)
  assert rm.ordered((queue, switch)) == (queue, switch)
  assert rm.ordered((switch, queue)) == (switch, queue)


def test_a_circle_is_an_error_that_names_the_actions():
  # Both write the executable, so Fetch keeps its place before Rejoin; but it
  # reads the mesh that Rejoin writes.
  with pytest.raises(ValueError, match="FetchExecutable, Rejoin"):
    rm.ordered((FETCH, rm.Rejoin(3)))


def test_a_good_plan_passes_and_gives_the_view_after_resume():
  view = lost_view()
  after = rm.check(good_plan(view), view)
  assert rm.servable(after) is None
  assert after.epoch > view.epoch


def empty_slot_table(view):
  entries = view.table.entries.copy()
  entries[6, 0] = (0, 2)
  entries[7, 0] = (1, 2)
  return rm.RemapExperts(rm.RoutingTable(entries))


def dead_rank_table(view):
  entries = view.table.entries.copy()
  entries[6, 0] = (3, 0)
  return rm.RemapExperts(rm.RoutingTable(entries))


def wide_table(view):
  entries = np.repeat(view.table.entries, 2, axis=1)
  return rm.RemapExperts(rm.RoutingTable(entries))


def crowd(view):
  names = view.requests.request_id[:6]
  return rm.RecomputePrefix(names, (0,) * 6)


BAD = {
  "dead source": (
    rm.CopyExperts,
    lambda v: rm.CopyExperts((rm.Move(6, 0, 2, 3),), rm.Tier.PEER),
    "CopyExperts: source rank 3 is LOST",
  ),
  "source without it": (
    rm.CopyExperts,
    lambda v: rm.CopyExperts((rm.Move(6, 0, 2, 1),), rm.Tier.PEER),
    "CopyExperts: source rank 1 holds no expert 6",
  ),
  "unknown slot": (
    rm.CopyExperts,
    lambda v: rm.CopyExperts((rm.Move(6, 0, 9),), rm.Tier.HOST),
    r"CopyExperts: slot 9 is outside 0\.\.2",
  ),
  "one slot twice": (
    rm.CopyExperts,
    lambda v: rm.CopyExperts(
      (rm.Move(6, 0, 2), rm.Move(7, 0, 2)), rm.Tier.HOST
    ),
    "CopyExperts: 2 moves fill only 1",
  ),
  "copy to the dead": (
    rm.CopyExperts,
    lambda v: rm.CopyExperts((rm.Move(6, 3, 0),), rm.Tier.HOST),
    "CopyExperts: rank 3 is LOST",
  ),
  "empty slot": (
    rm.CopyExperts,
    lambda v: rm.Verify(),
    "RemapExperts: expert 6 is routed to rank 0 slot 2, which is empty",
  ),
  "dead slot": (
    rm.RemapExperts,
    dead_rank_table,
    "RemapExperts: expert 6 is routed to rank 3, which is LOST",
  ),
  "other shape": (rm.RemapExperts, wide_table, r"shape \(16, 2, 2\), not"),
  "unknown rank": (
    rm.RebuildMesh,
    lambda v: rm.RebuildMesh((0, 1, 2, 99)),
    r"RebuildMesh: unknown rank 99; known: 0\.\.7",
  ),
  "dead member": (
    rm.RebuildMesh,
    lambda v: rm.RebuildMesh(tuple(range(8))),
    "RebuildMesh: rank 3 is LOST",
  ),
  "other order": (
    rm.RebuildMesh,
    lambda v: rm.RebuildMesh((1, 0, 2, 4, 5, 6, 7)),
    "RebuildMesh: rank 1 at place 0 of the mesh, not 0",
  ),
  "no mesh": (rm.RebuildMesh, lambda v: rm.RebuildMesh(()), "0 ranks"),
  "too many rows": (
    rm.RecomputePrefix,
    crowd,
    "RecomputePrefix: rank 0 would have 7 rows; its limit is 5",
  ),
  "request to the dead": (
    rm.RecomputePrefix,
    lambda v: rm.RecomputePrefix(("r0003", "r0011"), (3, 1)),
    "RecomputePrefix: request 'r0003' to rank 3",
  ),
  "unknown request": (
    rm.RecomputePrefix,
    lambda v: rm.Requeue(("nobody",)),
    "Requeue: moves request 'nobody', which the plan doesn't pause",
  ),
  "no checkpoint": (
    rm.RecomputePrefix,
    lambda v: rm.RestoreKV(("r0003",), (1,), rm.Tier.PEER),
    "RestoreKV: request 'r0003' has 0 checkpointed tokens",
  ),
  "left behind": (
    rm.RecomputePrefix,
    lambda v: rm.Requeue(("r0003",)),
    "request r0011 sits on rank 3, LOST",
  ),
  "other executable": (
    rm.FetchExecutable,
    lambda v: rm.FetchExecutable(frozenset({4})),
    r"the executable is of mesh None, the mesh is \[3\]",
  ),
  "uncovered expert": (
    rm.RemapExperts,
    lambda v: rm.RemapExperts(v.table),
    "expert 6 has 0 live slots and is not masked",
  ),
  "masking": (
    rm.RemapExperts,
    lambda v: rm.MaskExperts((6, 7)),
    r"MaskExperts: hides experts \(6, 7\), but the policy is declared lossless",
  ),
  "failing": (
    rm.RecomputePrefix,
    lambda v: rm.FailRequests(("r0003", "r0011")),
    "FailRequests: ends 2 requests, but the policy doesn't declare it",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_illegal_plan_is_refused_with_value_and_limit(name):
  kind, make, message = BAD[name]
  view = lost_view()
  before = cases.frozen(view)
  plan = replaced(good_plan(view), kind, make(view))
  with pytest.raises(rm.IllegalPlan, match=message):
    rm.check(plan, view)
  assert cases.frozen(view) == before


def test_declared_losses_are_allowed():
  view = lost_view()
  plan = replaced(good_plan(view), rm.RemapExperts, rm.MaskExperts((6, 7)))
  rm.check(plan, view, lossy=True)
  ended = rm.FailRequests(("r0003", "r0011"))
  plan = replaced(good_plan(view), rm.RecomputePrefix, ended)
  rm.check(plan, view, fails_requests=True)


def test_masking_leaves_enough_experts_for_a_token():
  view = lost_view()
  mask = rm.MaskExperts(tuple(range(15)))
  plan = replaced(good_plan(view), rm.RemapExperts, mask)
  with pytest.raises(rm.IllegalPlan, match="1 experts are left; a token need"):
    rm.check(plan, view, lossy=True)


def test_repair_may_not_stop_traffic():
  view = lost_view()
  plan = good_plan(view)
  stop = (rm.RebuildMesh((0, 1, 2, 4, 5, 6)),)
  with pytest.raises(rm.IllegalPlan, match="RebuildMesh leaves a view"):
    rm.check(dataclasses.replace(plan, repair=stop), view)


def test_paused_requests_must_exist():
  view = lost_view()
  plan = dataclasses.replace(good_plan(view), paused=("nobody",))
  with pytest.raises(rm.IllegalPlan, match="paused request 'nobody'"):
    rm.check(plan, view)


def apart():
  """A view in which rank 1 has left attention for experts, and can go back."""
  view = cases.start("role_switch", "2+4x8")
  return rm.advance_all(
    view,
    [
      rm.SwitchRole(1, rm.Role.EXPERT),
      rm.Requeue(tuple(view.requests.request_id)),
    ],
  )


def test_copies_wait_for_the_rank_that_becomes_an_expert_rank():
  copy = rm.CopyExperts((rm.Move(0, 1, 0),), rm.Tier.HOST)
  switch = rm.SwitchRole(1, rm.Role.EXPERT)
  mesh = rm.RebuildMesh((0, 1, 3, 4, 5))
  route = rm.RemapExperts(cases.start("role_switch", "2+4x8").table)
  assert rm.ordered((route, copy, mesh, switch)) == (switch, copy, mesh, route)


def test_who_attends_again_gives_its_experts_away_first():
  view = apart()
  read = rm.CopyExperts((rm.Move(0, 1, 0, 2),), rm.Tier.PEER)
  view = rm.advance(view, read)
  view = rm.advance(view, rm.Fence((2,)))
  view = rm.advance(view, rm.RebuildMesh((0, 1, 3, 4, 5)))
  back = rm.SwitchRole(1, rm.Role.ATTENTION)
  away = rm.CopyExperts((rm.Move(0, 3, 0, 1),), rm.Tier.PEER)
  moved = rm.advance(view, away)
  route = rm.RemapExperts(rm.retable(moved))
  restore = rm.RecomputePrefix(("r0000",), (1,))
  steps = rm.ordered((restore, back, route, away))
  assert steps == (away, route, back, restore)
  after = rm.advance_all(view, steps)
  assert (after.slots[1] == -1).all()
  assert cases.held(after, 0) == {3}
  assert rm.ordered((back, away)) == (away, back), "also without a table"
