"""What a checkpoint of KV may promise, and what it must not."""

import threading
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
import pytest

from resilient_moe.runtime.kv_checkpoint import KVCheckpointer
from resilient_moe.serving.scheduler import Chunk, Row, StepBatch

L, K2, T, D = 2, 2, 32, 4  # layers, KV heads twice, positions, head size
ROWS = 2
MESH = (0, 1, 2)
KV = np.random.default_rng(0).standard_normal((L, K2, T, D)).astype(np.float32)


def make(
  warnings: list[str], mode: str = "peer", capacity: int = 4
) -> KVCheckpointer:
  return KVCheckpointer(mode, (L, K2, T, D), "float32", capacity,
                        warnings.append)  # fmt: skip


@pytest.fixture
def warnings() -> list[str]:
  return []


@pytest.fixture
def keeper(warnings: list[str]) -> Iterator[KVCheckpointer]:
  made = make(warnings)
  yield made
  made.close()


class Slow:
  """A delta that is not there until it is let go."""

  def __init__(self, array: np.ndarray) -> None:
    self.array = array
    self.go = threading.Event()

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    self.go.wait()
    return self.array


def stream(
  keeper: KVCheckpointer, *parts: tuple[str, int, int, int],
  mesh: tuple[int, ...] = MESH, retired: tuple[str, ...] = (),
  wait: bool = True,
) -> Slow:  # fmt: skip
  """One step of `parts`: (request, place in the mesh, start, length).

  Everybody's KV is that of `KV`, moved by the place.
  """
  width = 16
  delta = np.zeros((L, len(mesh), ROWS + width, K2, D), np.float32)
  rows, chunks = [], []
  for name, place, start, length in parts:
    lane = ROWS if length > 1 else 0
    span = np.swapaxes(KV[:, :, start : start + length], 1, 2) + place
    delta[:, place, lane : lane + length] = span
    if length > 1:
      chunks.append(Chunk(place, 0, name, start, length, True))
    else:
      rows.append(Row(place, 0, name, start, True))
  none = np.zeros(0, np.int32)
  batch = StepBatch(0, 0, mesh, width, tuple(rows), tuple(chunks), none, none,
                    none, none, none, 0, retired)  # fmt: skip
  slow = Slow(delta)
  if wait:
    slow.go.set()
  keeper.stream(batch, cast(jax.Array, slow), ROWS)
  if wait:
    keeper.drain()
  return slow


def restored(keeper: KVCheckpointer, name: str) -> np.ndarray:
  found = keeper.restore(name)
  assert found is not None
  return found


def test_what_was_streamed_comes_back(keeper: KVCheckpointer) -> None:
  stream(keeper, ("a", 0, 0, 9), ("b", 2, 0, 5))
  stream(keeper, ("a", 0, 9, 1), ("b", 2, 5, 4))
  assert keeper.records() == {"a": (10, 1), "b": (9, 0)}
  np.testing.assert_array_equal(restored(keeper, "a"), KV[:, :, :10])
  np.testing.assert_array_equal(restored(keeper, "b"), KV[:, :, :9] + 2)
  assert keeper.restore("c") is None
  assert keeper.nbytes_streamed == 19 * L * K2 * D * 4


class Torn:
  """A mirror that takes half of a segment and fails."""

  def __init__(self, array: np.ndarray) -> None:
    self.array = array

  def __getitem__(self, entry: int) -> "Torn":
    return Torn(self.array[entry])

  def __setitem__(self, at: Any, value: np.ndarray) -> None:
    half = value.shape[2] // 2
    start = at[2].start
    self.array[:, :, start : start + half] = value[:, :, :half]
    raise OSError("torn")


def test_a_torn_segment_is_never_restored(
  keeper: KVCheckpointer, warnings: list[str]
) -> None:
  stream(keeper, ("a", 0, 0, 6))
  whole = keeper._mirror
  keeper._mirror = cast(np.ndarray, Torn(whole))
  stream(keeper, ("a", 0, 6, 8), ("b", 1, 0, 8))
  keeper._mirror = whole
  assert warnings == ["KV checkpoint stopped for a step: OSError('torn')"]
  np.testing.assert_array_equal(restored(keeper, "a"), KV[:, :, :6])
  assert keeper.restore("b") is None
  assert keeper.lag_steps() == 0


def test_a_gap_is_not_bridged_until_it_is_filled(
  keeper: KVCheckpointer,
) -> None:
  stream(keeper, ("a", 0, 0, 6))
  stream(keeper, ("a", 0, 7, 1))  # 6 was lost
  np.testing.assert_array_equal(restored(keeper, "a"), KV[:, :, :6])
  keeper.rebase("a", KV[:, :, :8], 2)
  assert keeper.records()["a"] == (8, 2)
  stream(keeper, ("a", 0, 8, 1))
  assert keeper.records()["a"] == (9, 2)
  np.testing.assert_array_equal(restored(keeper, "a"), KV[:, :, :9])


def test_a_step_that_is_run_again_changes_nothing(
  keeper: KVCheckpointer,
) -> None:
  stream(keeper, ("a", 0, 0, 6))
  stream(keeper, ("a", 0, 6, 1))
  stream(keeper, ("a", 0, 6, 1))
  np.testing.assert_array_equal(restored(keeper, "a"), KV[:, :, :7])


def test_a_holder_takes_its_mirrors_with_it(keeper: KVCheckpointer) -> None:
  stream(keeper, ("a", 0, 0, 6), ("b", 1, 0, 6), ("c", 2, 0, 6))
  assert {h for _, h in keeper.records().values()} == {0, 1, 2}
  keeper.forget_rank(1)
  assert keeper.restore("a") is None
  assert set(keeper.records()) == {"b", "c"}
  stream(keeper, ("a", 0, 6, 1))  # behind the gap
  assert keeper.restore("a") is None


def test_what_a_dead_rank_had_not_sent_is_not_used(
  keeper: KVCheckpointer,
) -> None:
  """Its last delta lay in its own memory."""
  stream(keeper, ("a", 0, 0, 6), ("c", 2, 0, 6))
  slow = stream(keeper, ("a", 0, 6, 4), ("c", 2, 6, 4), wait=False)
  dies = threading.Thread(target=keeper.forget_rank, args=(2,))
  dies.start()
  while 2 not in keeper._dead:
    threading.Event().wait(0.001)
  assert keeper.lag_steps() == 1
  slow.go.set()
  dies.join()
  assert keeper.records() == {"a": (10, 1), "c": (6, 0)}
  np.testing.assert_array_equal(restored(keeper, "c"), KV[:, :, :6] + 2)


def test_a_replacement_of_a_dead_rank_streams_again(
  keeper: KVCheckpointer,
) -> None:
  keeper.forget_rank(2)
  stream(keeper, ("c", 2, 0, 6))
  assert keeper.records() == {}
  keeper.remember_rank(2)
  stream(keeper, ("c", 2, 0, 6))
  assert keeper.records() == {"c": (6, 0)}


def test_without_room_a_request_is_not_kept_and_that_is_said(
  warnings: list[str],
) -> None:
  keeper = make(warnings, capacity=1)
  stream(keeper, ("a", 0, 0, 6), ("b", 1, 0, 6))
  assert warnings == ["no room to checkpoint request 'b'"]
  assert keeper.restore("b") is None
  np.testing.assert_array_equal(restored(keeper, "a"), KV[:, :, :6])
  stream(keeper, ("c", 1, 0, 6), retired=("a",))
  np.testing.assert_array_equal(restored(keeper, "c"), KV[:, :, :6] + 1)
  keeper.close()


@pytest.mark.parametrize(
  ("mode", "mesh", "holder"),
  [("peer", (4, 7, 2), 7), ("peer", (4,), -1), ("host", (4, 7, 2), -1)],
)
def test_who_holds_it(
  warnings: list[str], mode: str, mesh: tuple[int, ...], holder: int
) -> None:
  keeper = make(warnings, mode)
  assert keeper.holder(mesh, 0) == holder
  assert keeper.holder(mesh, len(mesh) - 1) == (holder if holder < 0 else 4)
  keeper.close()


def test_an_unknown_mode_names_the_choices(warnings: list[str]) -> None:
  with pytest.raises(ValueError, match="'tape': choose one of none, peer, ho"):
    make(warnings, "tape")
