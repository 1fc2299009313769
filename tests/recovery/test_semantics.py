"""What every action does to a view, and that every interpreter knows it."""

import dataclasses

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.recovery.explain import EXPLAIN
from resilient_moe.recovery.price import PRICE
from resilient_moe.recovery.semantics import ADVANCE
from tests.recovery import cases
from tests.recovery.cases import shrunk, start


def row(view, name):
  """The columns of one request as a dict."""
  i = view.requests.request_id.index(name)
  columns = [f.name for f in dataclasses.fields(view.requests)][1:]
  return {c: int(getattr(view.requests, c)[i]) for c in columns}


# For each action: a view it can be done from, and the action.
EXAMPLES = {
  rm.Fence: lambda: (start(), rm.Fence((3,))),
  rm.RebuildMesh: lambda: (
    rm.lose(start(), (3,)),
    rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7)),
  ),
  rm.FetchExecutable: lambda: (
    shrunk(start()),
    rm.FetchExecutable(frozenset({3})),
  ),
  rm.CopyExperts: lambda: (
    start(),
    rm.CopyExperts((rm.Move(6, 0, 4, 3),), rm.Tier.PEER),
  ),
  rm.RemapExperts: lambda: (start(), rm.RemapExperts(start().table)),
  rm.MaskExperts: lambda: (start(), rm.MaskExperts((1,))),
  rm.RestoreKV: lambda: (
    shrunk(start()),
    rm.RestoreKV(("r0003",), (4,), rm.Tier.PEER),
  ),
  rm.RecomputePrefix: lambda: (
    shrunk(start()),
    rm.RecomputePrefix(("r0003",), (4,)),
  ),
  rm.Requeue: lambda: (start(), rm.Requeue(("r0003",))),
  rm.FailRequests: lambda: (start(), rm.FailRequests(("r0003",))),
  rm.SwitchRole: lambda: (
    start(size="2+4x8"), rm.SwitchRole(1, rm.Role.EXPERT)
  ),
  rm.LaunchRank: lambda: (shrunk(start()), rm.LaunchRank(3)),
  rm.Rejoin: lambda: (
    rm.advance(shrunk(start()), rm.LaunchRank(3)),
    rm.Rejoin(3),
  ),
  rm.RestartInstance: lambda: (
    rm.lose(start(), (3,)),
    rm.RestartInstance((0, 1, 2, 4, 5, 6, 7), cache=True),
  ),
  rm.Verify: lambda: (start(), rm.Verify()),
}


def test_the_examples_cover_every_action():
  assert set(EXAMPLES) == set(rm.ACTIONS)


@pytest.mark.parametrize("kind", rm.ACTIONS)
def test_every_interpreter_knows_every_action(kind):
  for interpreter in (ADVANCE, PRICE, EXPLAIN):
    assert kind in interpreter
  view, action = EXAMPLES[kind]()
  before = cases.frozen(view)
  after = rm.advance(view, action)
  assert rm.plannable(after) is None
  assert after.epoch >= view.epoch
  cost = rm.price(action, view, rm.THIS_MACHINE)
  assert cost.seconds >= 0
  assert cost.bytes >= 0
  line = rm.explain(action)
  assert line
  assert "\n" not in line
  assert cases.frozen(view) == before, "advance wrote to its view"
  arrays = (after.status, after.slots, after.mesh, after.table.entries)
  assert not any(a.flags.writeable for a in arrays)


def test_an_unknown_action_is_named():
  class Pray(rm.Action):
    pass

  with pytest.raises(rm.IllegalPlan, match="unknown action Pray; choices: Co"):
    rm.advance(start(), Pray())


def test_loss_takes_all_that_the_rank_held():
  view = start()
  gone = rm.lose(view, (4,))
  assert gone.status[4] == rm.Status.LOST
  assert (gone.slots[4] == -1).all()
  assert not (gone.table.entries[:, :, 0] == 4).any()
  assert row(gone, "r0004")["kv_tokens"] == 0
  assert row(gone, "r0004")["checkpoint_tokens"] > 0  # it lies on rank 5
  neighbour = row(gone, "r0003")  # its checkpoint lay on rank 4
  assert neighbour["checkpoint_tokens"] == 0
  assert neighbour["checkpoint_rank"] == -1
  assert neighbour["kv_tokens"] > 0
  assert gone.epoch == view.epoch
  assert rm.plannable(gone) is None
  assert "rank 4 in the mesh is LOST" in str(rm.servable(gone))
  assert cases.frozen(rm.lose(gone, (4,))) == cases.frozen(gone)


def test_live_copies_stay_in_front_of_the_padding():
  view = start("replica_promotion")
  first = int(view.table.entries[0, 0, 0])
  gone = rm.lose(view, (first,))
  assert gone.table.entries[0, 0, 0] == view.table.entries[0, 1, 0]
  assert gone.table.entries[0, 1, 0] == -1


def test_a_copy_takes_the_slot_out_of_service_first():
  view = start("replica_promotion")
  rank, slot = view.table.entries[0, 0]
  move = rm.Move(5, int(rank), int(slot))
  after = rm.advance(view, rm.CopyExperts((move,), rm.Tier.HOST))
  assert after.slots[rank, slot] == 5
  assert after.table.copies()[0] == view.table.copies()[0] - 1
  assert rm.plannable(after) is None


def test_fetching_another_mesh_makes_it_ready_only():
  view = start()
  after = rm.advance(view, rm.FetchExecutable(frozenset({1, 2})))
  assert after.executable == view.executable
  assert frozenset({1, 2}) in after.ready
  assert rm.servable(after) is None


def test_remap_unmasks_what_it_serves():
  view = rm.advance(start(), rm.MaskExperts((1,)))
  assert view.masked[1]
  assert view.table.copies()[1] == 0
  assert rm.servable(view) is None
  again = rm.advance(view, rm.RemapExperts(rm.retable(view)))
  assert not again.masked.any()
  assert again.table.copies()[1] >= 1


def test_restore_takes_the_checkpoint_and_hand_over_the_live_kv():
  view = shrunk(start())
  action = rm.RestoreKV(("r0003",), (4,), rm.Tier.PEER)
  restored = row(rm.advance(view, action), "r0003")
  assert restored["rank"] == 4
  assert restored["kv_tokens"] == restored["checkpoint_tokens"] == 117
  leaving = rm.advance(start(), rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7)))
  handed = row(rm.advance(leaving, action), "r0003")
  assert handed["kv_tokens"] == 119
  with pytest.raises(rm.IllegalPlan, match="on rank 4, not in tier host"):
    rm.advance(view, dataclasses.replace(action, tier=rm.Tier.HOST))


def test_plannable_sees_what_is_not_allowed():
  view = start()
  status = view.status.copy()
  status[3] = rm.Status.LOST
  cases_of = {
    "a lost rank still holds expert": {"status": status},
    "is outside 0..7": {"mesh": np.array([0, 8], np.int32)},
    "is twice in the mesh": {"mesh": np.array([0, 1, 1], np.int32)},
  }
  for reason, change in cases_of.items():
    broken = dataclasses.replace(view, **change)
    assert reason in str(rm.plannable(broken))
  entries = view.table.entries.copy()
  entries[2, 0] = -1
  gap = dataclasses.replace(view, table=rm.RoutingTable(entries))
  assert "pads expert 2 before its last copy" in str(rm.plannable(gap))
