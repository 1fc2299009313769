"""A lost rank's memory is gone; everybody else's is as it was."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from resilient_moe.faults import scenario
from resilient_moe.model.step import batch_width
from resilient_moe.runtime.device_store import DeviceStore, LostRankError
from tests.runtime.harness import RANKS, Host, Lab, make_case

MESH = tuple(range(RANKS))


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
  host = Host(lab, make_case(lab, "mesh_shrink"))
  _, backend = host.start()
  yield host
  backend.close()


@pytest.fixture
def store(host: Host) -> DeviceStore:
  found = host.backends[0].store
  assert isinstance(found, DeviceStore)
  return found


def idle(store: DeviceStore, n_ranks: int) -> np.ndarray:
  """A batch in which nobody computes anything."""
  options = store.shape.options
  ints = np.zeros((n_ranks, batch_width(options, 0)), np.int32)
  ints[:, options.rows : 2 * options.rows] = -1
  return ints


def random_kv(
  store: DeviceStore, tokens: int, rng: np.random.Generator
) -> np.ndarray:
  config = store.shape.config
  shape = (config.n_layers, 2 * config.n_kv_heads, tokens, config.head_dim)
  return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_a_row_comes_back_as_it_was_written(
  store: DeviceStore, rng: np.random.Generator, tokens: int
) -> None:
  """Through the commit program, in one chunk, and in several."""
  others, kv = random_kv(store, 20, rng), random_kv(store, tokens, rng)
  store.write_row(2, 0, others)
  store.write_row(2, 1, kv)
  np.testing.assert_array_equal(store.read_row(2, 1, tokens), kv)
  np.testing.assert_array_equal(store.read_row(2, 0, 20), others)
  assert not store.read_row(3, 1, tokens).any()


def test_a_slot_comes_back_as_it_was_written(
  store: DeviceStore, rng: np.random.Generator
) -> None:
  before = store.read_slot(1, 0)
  draw = lambda x: rng.standard_normal(x.shape).astype(x.dtype)
  new = jax.tree.map(draw, before)
  store.write_slot(1, 2, new)
  jax.tree.map(np.testing.assert_array_equal, store.read_slot(1, 2), new)
  jax.tree.map(np.testing.assert_array_equal, store.read_slot(1, 0), before)


def test_a_lost_rank_is_an_error_wherever_it_is_used(
  host: Host, store: DeviceStore, rng: np.random.Generator
) -> None:
  """Not a crash of the process, and not old bytes (`jax_facts.md`)."""
  routing = host.backends[0].routing()
  delta, _, ints = store.run(MESH, 0, routing, idle(store, RANKS))
  slot, row = store.read_slot(1, 0), random_kv(store, 4, rng)
  store.lose(1)
  uses: list[Callable[[], object]] = [
    lambda: store.read_slot(1, 0),
    lambda: store.write_slot(1, 0, slot),
    lambda: store.read_row(1, 0, 4),
    lambda: store.write_row(1, 0, row),
    lambda: store.run(MESH, 0, routing, idle(store, RANKS)),
    lambda: store.put_routing(MESH, {}),
    lambda: store.make_ready(MESH, 0, {}),
    lambda: store.commit(MESH, 0, delta, ints),
    lambda: store.lose(1),
  ]
  for use in uses:
    with pytest.raises(LostRankError, match="rank 1 is gone"):
      use()
  assert not store.holds(1)


def test_the_others_go_on(
  host: Host, store: DeviceStore, rng: np.random.Generator
) -> None:
  kv = random_kv(store, 30, rng)
  store.write_row(2, 1, kv)
  held = store.read_slot(2, 0)
  left = (0, 2, 3)
  store.lose(1)
  np.testing.assert_array_equal(store.read_row(2, 1, 30), kv)
  jax.tree.map(np.testing.assert_array_equal, store.read_slot(2, 0), held)
  backend = host.backends[0]
  routing = store.put_routing(left, backend.routing_of(np.array(left)))
  delta, _, ints = store.run(left, 0, routing, idle(store, 3))
  store.commit(left, 0, delta, ints)
  np.testing.assert_array_equal(store.read_row(2, 1, 30), kv)


def test_the_memory_of_a_lost_rank_is_freed(store: DeviceStore) -> None:
  held = jax.tree.leaves((store._dense[1], store._experts[1], store._cache[1]))
  store.lose(1)
  assert all(array.is_deleted() for array in held)


def test_a_commit_is_done_in_place(host: Host, store: DeviceStore) -> None:
  """The cache is donated: neither copied nor allocated anew."""
  at = lambda: [store._cache[r].unsafe_buffer_pointer() for r in MESH]
  before = at()
  routing = host.backends[0].routing()
  for _ in range(3):
    delta, _, ints = store.run(MESH, 0, routing, idle(store, RANKS))
    store.commit(MESH, 0, delta, ints)
  assert at() == before


def test_after_a_recovery_every_number_is_one(lab: Lab) -> None:
  faults = scenario("neighbours", RANKS, at_step=8, rank=1)
  host = Host(lab, make_case(lab, "kv_restore", faults))
  host.run()
  store = host.backends[0].store
  assert isinstance(store, DeviceStore)
  assert sorted(store._cache) == [0, 3]
  for array in jax.tree.leaves((store._experts, store._cache, store._dense)):
    assert np.isfinite(np.asarray(array)).all()
