"""Epochs, the order of a mesh, restarts and replacements."""

import pytest

from resilient_moe import recovery as rm
from tests.recovery.cases import shrunk, start


def test_restart_is_a_fresh_instance():
  view = rm.lose(start(), (3,))
  ranks = (0, 1, 2, 4, 5, 6, 7)
  after = rm.advance(view, rm.RestartInstance(ranks, cache=False))
  assert rm.servable(after) is None
  assert after.mesh.tolist() == list(ranks)
  assert after.slots_per_rank == view.slots_per_rank
  assert (after.requests.rank == -1).all()
  assert (after.requests.kv_tokens == 0).all()
  assert (after.requests.checkpoint_tokens == 0).all()
  assert after.requests.request_id == view.requests.request_id


def test_restart_makes_slots_for_the_ranks_it_has():
  view = start("restart_cached")
  after = rm.advance(view, rm.RestartInstance((0, 1), cache=True))
  assert after.slots_per_rank == 8
  assert rm.servable(after) is None
  assert after.cached == {rm.absent(view.launched, (0, 1))}


def test_a_replacement_is_another_device():
  view = shrunk(start())
  with_3 = frozenset({5})
  assert {frozenset({3}), with_3} <= view.ready
  launched = rm.advance(view, rm.LaunchRank(3))
  assert launched.status[3] == rm.Status.LAUNCHING
  assert frozenset({3}) in launched.ready
  assert with_3 not in launched.ready
  filled = rm.advance(
    launched, rm.CopyExperts((rm.Move(0, 3, 0),), rm.Tier.HOST)
  )
  joined = rm.advance(filled, rm.Rejoin(3))
  assert joined.mesh.tolist() == list(range(8))
  assert joined.executable == frozenset()
  assert joined.slots[3, 0] == 0


def test_the_order_of_a_mesh_follows_from_its_name():
  launched = tuple(range(4))
  meshes = [(0, 1, 2, 3), (0, 2, 3), (0, 4, 2, 3), (4, 5, 2), (0, 1, 2, 3, 4)]
  for mesh in meshes:
    name = rm.absent(launched, mesh)
    named = rm.mesh_named(launched, name)
    assert set(named.tolist()) == set(mesh)
    assert rm.absent(launched, named) == name
  assert rm.mesh_named(launched, frozenset({1, ~4})).tolist() == [0, 4, 2, 3]
  assert rm.mesh_named(launched, frozenset({~4})).tolist() == [0, 1, 2, 3, 4]


def test_every_change_of_membership_is_a_new_epoch():
  view = start()
  assert rm.advance(view, rm.Fence((3,))).epoch == 1
  smaller = rm.advance(view, rm.RebuildMesh(tuple(range(7))))
  assert smaller.epoch == 1
  assert rm.advance(view, rm.RebuildMesh(tuple(range(8)))).epoch == 0
  back = rm.advance(smaller, rm.Rejoin(7))
  assert back.epoch == 2
  restarted = rm.advance(view, rm.RestartInstance(tuple(range(8)), False))
  assert restarted.epoch == 1


def test_a_rank_left_out_is_a_spare_that_can_be_read():
  view = rm.advance(start(), rm.RebuildMesh(tuple(range(7))))
  assert view.status[7] == rm.Status.SPARE
  assert (view.slots[7] >= 0).any()
  assert not (view.table.entries[:, :, 0] == 7).any()
  assert view.executable is None
  expert = int(view.slots[7, 0])
  move = rm.Move(expert, 0, 4, 7)
  rm.advance(view, rm.CopyExperts((move,), rm.Tier.PEER))
  fenced = rm.advance(view, rm.Fence((7,)))
  with pytest.raises(rm.IllegalPlan, match="source rank 7 is LOST"):
    rm.advance(fenced, rm.CopyExperts((move,), rm.Tier.PEER))
