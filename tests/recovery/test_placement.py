"""Where copies lie, what a loss needs, and that planning work is bounded."""

import sys

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.recovery.packing import deal
from resilient_moe.recovery.placement import extra_copies
from tests.recovery import cases


def greedy(held, room, n):
  """What `deal` must equal: the emptiest first, one at a time."""
  held, room, out = held.copy(), room.copy(), []
  while len(out) < n and room.any():
    free = np.where(room > 0, held, np.iinfo(np.int64).max)
    at = int(free.argmin())
    held[at] += 1
    room[at] -= 1
    out.append(at)
  return out


@pytest.mark.parametrize("seed", range(40))
def test_dealing_at_once_equals_dealing_one_by_one(seed):
  rng = np.random.default_rng(seed)
  held, room = rng.integers(0, 5, (2, rng.integers(1, 9)))
  n = int(rng.integers(0, 20))
  assert deal(held, room, n).tolist() == greedy(held, room, n)


def test_dealing_nothing_to_nobody():
  empty = np.zeros(0, np.int64)
  assert deal(empty, empty, 3).tolist() == []


SHAPES = [
  # ranks, experts, ranks per host, hosts per rack
  (8, 16, 0, 0),
  (8, 16, 2, 0),
  (8, 16, 4, 0),
  (12, 8, 3, 2),
  (7, 16, 0, 0),
  (5, 3, 2, 0),
  (16, 64, 4, 2),
  (3, 10, 1, 0),
  (2, 5, 0, 0),
  (3, 9, 0, 0),  # the last copies find room only beside their own
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", [True, False])
def test_no_expert_keeps_all_copies_in_one_domain(shape, exact):
  ranks, experts, per_host, per_rack = shape
  view = rm.bare_view(
    ranks, experts, ranks_per_host=per_host, hosts_per_rack=per_rack
  )
  left = ranks if exact else ranks - 1
  per_rank = -(-2 * experts // left)
  slots = rm.place(view, per_rank, extra=experts)
  widest = view.rack if per_rack else view.host if per_host else None
  for expert in range(experts):
    at = np.flatnonzero((slots == expert).any(axis=1))
    assert (slots == expert).sum() == 2, f"expert {expert}"
    assert len(at) == 2, f"expert {expert} is twice on one rank"
    if widest is not None and len(set(widest.tolist())) > 1:
      assert widest[at[0]] != widest[at[1]], f"expert {expert}"


@pytest.mark.parametrize("shape", SHAPES)
def test_first_copies_are_balanced(shape):
  ranks, experts, *_ = shape
  view = rm.bare_view(ranks, experts)
  slots = rm.place(view, -(-experts // ranks))
  held = (slots >= 0).sum(axis=1)
  assert held.max() - held.min() <= 1
  assert sorted(slots[slots >= 0].tolist()) == list(range(experts))


def test_experts_that_do_not_fit_are_an_error():
  with pytest.raises(ValueError, match="16 experts don't fit in 3 ranks x 5"):
    rm.place(rm.bare_view(3, 16), 5)


def test_the_most_loaded_get_an_extra_copy_first():
  load = np.array([1.0, 5.0, 2.0, 5.0])
  assert extra_copies(4, 3, load).tolist() == [1, 3, 2]
  slots = rm.place(rm.bare_view(4, 4), 2, extra=2, load=load)
  assert np.bincount(slots[slots >= 0]).tolist() == [1, 2, 1, 2]


def test_copies_of_one_rank_lie_on_several():
  slots = rm.place(rm.bare_view(8, 64), 16, extra=64)
  mine = set(slots[0][:8].tolist())
  others = [r for r in range(1, 8) if mine & set(slots[r].tolist())]
  assert len(others) >= 4


def test_lost_experts_get_empty_slots_on_ranks_that_serve_least():
  view = rm.lose(cases.serving(rm.load("mesh_shrink"), "8x16"), (3,))
  view = rm.advance(view, rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7)))
  assert rm.lost_experts(view).tolist() == [6, 7]
  moves = rm.assign(view, [6, 7])
  assert [(m.rank, m.slot) for m in moves] == [(0, 2), (1, 2)]


def test_surplus_copies_make_room_when_nothing_is_empty():
  policy = rm.axes.compose(
    "tight",
    rm.axes.survivors(losses=0, ready="none"),
    rm.axes.replicas(8),
    rm.axes.re_prefill(),
  )
  view = cases.serving(policy, "8x16")
  gone = [r for r in range(8) if 15 in view.slots[r]]
  view = rm.lose(view, gone)
  plan = rm.recover_checked(policy, view, rm.RanksLost(tuple(gone)))
  copied = [m for a in plan.resume if hasattr(a, "moves") for m in a.moves]
  assert {m.expert for m in copied} >= {15}
  after = rm.check(plan, view)
  assert rm.servable(after) is None


def test_no_room_gives_the_reason():
  view = rm.bare_view(4, 8)
  slots = rm.place(view, 2)
  table = rm.routing_table(slots, view.mesh, 8, 1)
  view = rm.stand(view, rm.Standing(slots, table, 4))
  view = rm.advance_all(view, (rm.Fence((0,)), rm.RebuildMesh((1, 2, 3))))
  assert "2 experts need a slot, 0 are free on 3 ranks of 2" in rm.assign(
    view, [0, 1]
  )


def test_the_nearest_tier_is_a_live_slot_then_the_host_then_disk():
  view = cases.serving(rm.load("mesh_shrink"), "8x16")
  assert rm.nearest_tier(view, 6) == (rm.Tier.PEER, 3)
  gone = rm.lose(view, (3,))
  assert rm.nearest_tier(gone, 6) == (rm.Tier.HOST, -1)
  bare = cases.serving(rm.load("restart"), "8x16")
  assert rm.nearest_tier(rm.lose(bare, (3,)), 6) == (rm.Tier.DISK, -1)


def test_requests_go_where_rows_are_free():
  view = rm.lose(cases.serving(rm.load("mesh_shrink"), "8x16", 30), (3,))
  view = rm.advance(view, rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7)))
  displaced = view.requests.on([3])
  to = rm.spread_requests(view, displaced)
  assert 3 not in to
  assert (to >= 0).all()
  full = rm.lose(cases.serving(rm.load("mesh_shrink"), "8x16", 40), (3,))
  full = rm.advance(full, rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7)))
  assert (rm.spread_requests(full, full.requests.on([3])) == -1).all()


def test_requests_do_not_count_where_they_sit_now():
  view = cases.serving(rm.load("none"), "2x4", requests=8)
  assert (view.free_rows() == 0).all()
  to = rm.spread_requests(view, view.requests.on([0]))
  assert to.tolist() == [0, 0, 0, 0]


def test_a_new_copy_goes_to_another_rack_though_others_are_emptier():
  view = rm.bare_view(8, 8, ranks_per_host=2, hosts_per_rack=2)
  slots = rm.place(view, 4).copy()
  slots[4:, 1:3] = [[0, 1], [2, 3], [0, 1], [2, 3]]  # the other rack is full
  slots[4:, 1:3][slots[4:, 1:3] == 0] = 7
  table = rm.routing_table(slots, view.mesh, 8, 2)
  view = rm.stand(view, rm.Standing(slots, table, 4))
  (move,) = rm.replicate(view, np.array([0]))
  assert view.rack[move.rank] != view.rack[0]


def opcodes(policy, view, failure):
  """Bytecodes that Python runs for a checked plan: its loops, not NumPy's."""
  count = 0

  def trace(frame, event, arg):
    nonlocal count
    del arg
    frame.f_trace_opcodes = True
    count += event == "opcode"
    return trace

  policy.recover(view, failure)  # fill caches
  sys.settrace(trace)
  try:
    rm.recover_checked(policy, view, failure)
  finally:
    sys.settrace(None)
  return count


@pytest.mark.parametrize("attention", [0, 0.4])
@pytest.mark.parametrize(
  "name", ["mesh_shrink", "kv_restore", "mask_experts", "tarragon"]
)
def test_planning_work_does_not_grow_with_ranks(name, attention):
  policy = rm.load(name, replace=True)
  if not attention and "collocated" not in policy.deployments:
    return
  work: dict[int, list[int]] = {}
  for ranks in (1_280, 10_240):
    attend = int(attention * ranks)
    full = rm.big_view(ranks, n_requests=500, attention=attend)
    for lost in {77, attend + 77}:
      failure = rm.RanksLost((lost,))
      view = rm.lose(full, (lost,))
      work.setdefault(lost == 77, []).append(opcodes(policy, view, failure))
  for few, many in work.values():
    assert many < 1.2 * few, f"{work}: a Python loop over the ranks"


@pytest.mark.parametrize("slots", [1, 2])
def test_the_big_view_can_be_served(slots):
  view = rm.big_view(1_024, slots_per_rank=slots, n_requests=100)
  assert rm.servable(view) is None
  assert (view.table.copies() >= 2).all()
  apart = rm.big_view(
    1_024, slots_per_rank=slots, n_requests=100, attention=300
  )
  assert rm.servable(apart) is None
  assert (apart.slots[:300] == -1).all()
  assert apart.requests.rank.max() < 300
