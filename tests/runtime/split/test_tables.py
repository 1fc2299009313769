"""What attention ranks are told of a view, and what experts do with it."""

import dataclasses

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.datapath.routes import ExpertRoutes
from resilient_moe.runtime.split.tables import routes_of
from tests.runtime.harness import MODEL, Host, Lab
from tests.runtime.split.apart import apart

E = 8


def standing(policy: str, **kwargs) -> rm.ClusterView:
  bare = rm.bare_view(6, E, rows_per_rank=2, attention=2)
  return rm.stand(bare, rm.load(policy, **kwargs).prepare(bare))


def places(entries: np.ndarray) -> list[set[int]]:
  """The ranks of each expert's copies; where a slot is, the expert stands."""
  found = []
  for expert, copies in enumerate(entries.tolist()):
    assert {name for rank, name in copies if rank >= 0} <= {expert}
    assert all(name == -1 for rank, name in copies if rank < 0)
    found.append({rank for rank, _ in copies if rank >= 0})
  return found


def held(view: rm.ClusterView) -> list[set[int]]:
  return [
    set(np.flatnonzero((view.slots == e).any(axis=1)).tolist())
    for e in range(E)
  ]


def test_one_copy_serves_and_the_other_is_a_shadow() -> None:
  view = standing("tarragon")
  routes = routes_of(view, 7, {3: 2})
  serving, shadows = places(routes.serving), places(routes.standby)
  for e in range(E):
    assert len(serving[e]) == len(shadows[e]) == 1
    assert serving[e] | shadows[e] == held(view)[e]
  assert routes.epoch == 7
  assert routes.incarnations == {2: 0, 3: 2, 4: 0, 5: 0}


def test_replicas_all_serve() -> None:
  view = standing("replica_promotion")
  routes = routes_of(view, 1, {})
  assert places(routes.serving) == held(view)
  assert places(routes.standby) == [set()] * E


@pytest.mark.parametrize("spread", [0, 1])
def test_what_is_routed_is_held_whoever_is_dead(spread: int) -> None:
  for dead in range(2, 6):
    view = rm.lose(standing("tarragon"), (dead,))
    routes = routes_of(view, 1, {})
    assert dead not in routes.incarnations
    every = np.arange(E)
    rank, name = ExpertRoutes(routes).lookup(every, np.full(E, spread))
    assert name.tolist() == every.tolist(), "a shadow serves what nobody does"
    assert all(int(r) in held(view)[e] for e, r in enumerate(rank))


def test_who_is_left_out_of_the_mesh_serves_nothing() -> None:
  view = rm.advance(standing("tarragon"), rm.RebuildMesh((0, 1, 3, 4, 5)))
  assert (view.slots[2] >= 0).any()
  routes = routes_of(view, 1, {})
  assert 2 not in routes.incarnations
  assert not any(2 in r for r in places(routes.serving))
  assert not any(2 in r for r in places(routes.standby))


def test_a_masked_expert_has_no_shadow() -> None:
  """The gate must not come back to it before the orchestrator says so."""
  view = rm.advance(standing("tarragon"), rm.MaskExperts((3,)))
  routes = routes_of(view, 1, {})
  assert places(routes.serving)[3] == places(routes.standby)[3] == set()
  assert routes.masked.tolist() == [e == 3 for e in range(E)]


def test_an_attention_rank_that_was_given_experts_serves_them() -> None:
  view = standing("role_switch")
  view = rm.advance_all(
    rm.lose(view, (5,)),
    (rm.Fence((5,)), rm.RebuildMesh((0, 1, 2, 3, 4)),
     rm.SwitchRole(1, rm.Role.EXPERT)),
  )  # fmt: skip
  moves = rm.assign(view, rm.lost_experts(view))
  copies = rm.copies_from(view, moves)
  view = rm.advance_all(view, copies)
  routes = routes_of(view, 1, {})
  lost = [m.expert for m in moves]
  assert {m.rank for m in moves} == {1}
  assert [places(routes.standby)[e] for e in lost] == [{1}] * len(lost)
  view = rm.advance(view, rm.RemapExperts(rm.retable(view)))
  routes = routes_of(view, 2, {})
  assert [places(routes.serving)[e] for e in lost] == [{1}] * len(lost)


def test_the_mask_is_a_copy() -> None:
  view = standing("tarragon")
  masked = view.masked.copy()
  view = dataclasses.replace(view, masked=masked)
  routes = routes_of(view, 1, {})
  masked[0] = True
  assert not routes.masked[0]


def test_a_table_that_is_out_of_date_computes_with_nobody_elses_weights(
  lab: Lab,
) -> None:
  """Parcels name experts: a slot that was written anew is not the old one."""
  _, backend = Host(lab, apart(lab, "none")).start()
  view, store = backend.view(), backend.store
  (rank, slot), other = view.table.entries[0, 0], 5
  assert view.table.entries[other, 0, 0] != rank
  there = store.links.experts[int(rank)]
  rows = np.ones((1, MODEL.d_model), np.float32)
  ask = lambda e: there.compute(
    0, rows, np.zeros(1, np.int32), np.array([e], np.int32)
  )
  before = ask(0)
  with pytest.raises(LookupError, match=r"experts \[5\] are not held here"):
    ask(other)
  weights = store.read_slot(*view.table.entries[other, 0].tolist())
  store.write_slot(int(rank), int(slot), other, weights)
  with pytest.raises(LookupError, match=r"experts \[0\] are not held here"):
    ask(0)
  assert not np.array_equal(ask(other), before)
  backend.close()


def test_an_expert_that_is_held_twice_survives_the_loss_of_one_slot(
  lab: Lab,
) -> None:
  _, backend = Host(lab, apart(lab, "none")).start()
  view, store = backend.view(), backend.store
  rank, expert = 3, int(view.slots[3, 0])
  other = int(view.slots[4, 0])
  there = store.links.experts[rank]
  rows, token = np.ones((1, MODEL.d_model), np.float32), np.zeros(1, np.int32)
  ask = lambda e: there.compute(0, rows, token, np.array([e], np.int32))
  before = ask(expert)
  store.write_slot(rank, 1, expert, store.read_slot(rank, 0))
  np.testing.assert_array_equal(ask(expert), before)
  store.write_slot(rank, 1, other, store.read_slot(4, 0))
  np.testing.assert_array_equal(ask(expert), before)
  backend.close()
