"""What a mirror of KV may hand back, and what it must refuse."""

import threading
import time

import numpy as np
import pytest

from resilient_moe.runtime.process.mirror import (
  STAGED_STEPS,
  Intake,
  KVMirror,
  named_dtype,
)

L, K2, T, D = 2, 4, 16, 3  # layers, KV heads twice, positions, head size


@pytest.fixture
def mirror() -> KVMirror:
  return KVMirror((L, K2, T, D), "float32")


def lanes(rng: np.random.Generator, count: int) -> np.ndarray:
  return rng.standard_normal((L, count, K2, D)).astype(np.float32)


def held(mirror: KVMirror, name: str) -> np.ndarray:
  kv = mirror.get(name)
  assert kv is not None
  return kv


def test_a_prompt_and_its_decoded_positions_come_back(mirror, rng):
  data = lanes(rng, 7)
  assert mirror.put([("a", 2, 0, 5)], data) == ()
  assert mirror.put([("b", 0, 0, 1), ("a", 1, 5, 1)], data) == ()
  assert mirror.records() == {"a": 6, "b": 1}
  order = np.concatenate([data[:, 2:7], data[:, 1:2]], axis=1)
  np.testing.assert_array_equal(held(mirror, "a"), order.swapaxes(1, 2))
  np.testing.assert_array_equal(held(mirror, "b")[:, :, 0], data[:, 0])
  assert mirror.nbytes == 2 * data.nbytes


def test_nothing_is_kept_of_a_request_that_never_began(mirror, rng):
  assert mirror.get("a") is None
  assert mirror.put([("a", 0, 3, 1)], lanes(rng, 1)) == ("a",)
  assert mirror.get("a") is None
  assert mirror.records() == {}


def test_a_gap_is_refused_by_name_and_changes_nothing(mirror, rng):
  mirror.put([("a", 0, 0, 4), ("b", 4, 0, 1)], lanes(rng, 5))
  before = held(mirror, "a")
  data = lanes(rng, 3)
  refused = mirror.put([("a", 0, 5, 1), ("b", 1, 1, 1), ("a", 2, 6, 1)], data)
  assert refused == ("a",)
  assert mirror.records() == {"a": 4, "b": 2}
  np.testing.assert_array_equal(held(mirror, "a"), before)


def test_a_rebase_fills_the_gap(mirror, rng):
  assert mirror.put([("a", 0, 5, 1)], lanes(rng, 1)) == ("a",)
  kv = rng.standard_normal((L, K2, 6, D)).astype(np.float32)
  mirror.rebase("a", kv)
  assert mirror.put([("a", 0, 6, 1)], lanes(rng, 1)) == ()
  assert mirror.records() == {"a": 7}
  np.testing.assert_array_equal(held(mirror, "a")[:, :, :6], kv)


def test_a_rebase_replaces_what_was_longer(mirror, rng):
  mirror.put([("a", 0, 0, 9)], lanes(rng, 9))
  mirror.rebase("a", np.ones((L, K2, 2, D), np.float32))
  assert mirror.records() == {"a": 2}


def test_replays_do_not_take_tokens_back(mirror, rng):
  steps = [([("a", 0, 0, 4)], lanes(rng, 4))]
  steps += [([("a", 0, 4 + i, 1)], lanes(rng, 1)) for i in range(4)]
  for step in steps:
    mirror.put(*step)
  before = held(mirror, "a")
  for step in steps[2:4]:
    assert mirror.put(*step) == ()
  assert mirror.records() == {"a": 8}
  np.testing.assert_array_equal(held(mirror, "a"), before)


def test_position_zero_begins_anew(mirror, rng):
  mirror.put([("a", 0, 0, 9)], lanes(rng, 9))
  data = lanes(rng, 3)
  mirror.put([("a", 0, 0, 3)], data)
  np.testing.assert_array_equal(held(mirror, "a"), data.swapaxes(1, 2))
  assert mirror.put([("a", 0, 4, 1)], data) == ("a",)


def test_what_was_handed_out_is_a_copy(mirror, rng):
  data = lanes(rng, 4)
  mirror.put([("a", 0, 0, 4)], data)
  kv = held(mirror, "a")
  mirror.forget(["a"])
  mirror.put([("b", 0, 0, 4)], lanes(rng, 4))
  np.testing.assert_array_equal(kv, data.swapaxes(1, 2))


def test_room_of_forgotten_requests_is_used_again(mirror, rng):
  mirror.put([("a", 0, 0, 8)], lanes(rng, 8))
  room = mirror._records["a"].kv
  mirror.forget(["a", "unknown"])
  assert mirror.records() == {}
  data = lanes(rng, 2)
  mirror.put([("b", 0, 0, 2)], data)
  assert mirror._records["b"].kv is room
  np.testing.assert_array_equal(held(mirror, "b"), data.swapaxes(1, 2))


@pytest.mark.parametrize(
  ("segment", "shape", "dtype"),
  [
    (("a", 0, 4, T), (L, T, K2, D), "float32"),  # behind the end
    (("a", 2, 4, 2), (L, 3, K2, D), "float32"),  # lanes that aren't there
    (("a", -1, 4, 1), (L, 3, K2, D), "float32"),
    (("a", 0, -1, 1), (L, 3, K2, D), "float32"),
    (("a", 0, 4, 0), (L, 3, K2, D), "float32"),
    (("a", 0, 4, 1), (L, 3, K2, D + 1), "float32"),
    (("a", 0, 4, 1), (L, K2, D), "float32"),
    (("a", 0, 4, 1), (L, 3, K2, D), "float64"),
  ],
)
def test_a_step_that_does_not_fit_changes_nothing(
  mirror, rng, segment, shape, dtype
):
  mirror.put([("a", 0, 0, 4)], lanes(rng, 4))
  with pytest.raises(ValueError, match=r"segment of 'a'|data is"):
    mirror.put([("a", 0, 4, 1), segment], np.zeros(shape, dtype))
  assert mirror.records() == {"a": 4}


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((L, K2, T + 1, D), "float32"),
    ((L, K2, 3, D + 1), "float32"),
    ((L, K2, 3), "float32"),
    ((L, K2, 3, D), "float64"),
  ],
)
def test_a_rebase_that_does_not_fit_changes_nothing(mirror, rng, shape, dtype):
  mirror.put([("a", 0, 0, 4)], lanes(rng, 4))
  with pytest.raises(ValueError, match=r"KV of 'a' is|data is"):
    mirror.rebase("a", np.zeros(shape, dtype))
  assert mirror.records() == {"a": 4}


def test_half_precision_keeps_its_bits(rng):
  mirror = KVMirror((L, K2, T, D), "bfloat16")
  data = lanes(rng, 3).astype(named_dtype("bfloat16"))
  mirror.put([("a", 0, 0, 3)], data)
  back = held(mirror, "a").swapaxes(1, 2)
  np.testing.assert_array_equal(back.view(np.uint16), data.view(np.uint16))
  with pytest.raises(ValueError, match="float31"):
    named_dtype("float31")


def test_random_segments_leave_what_a_plain_model_says(mirror, rng):
  model: dict[str, list[np.ndarray]] = {}  # request -> [L, 2K, d] a position
  for _ in range(600):
    name = "abcdef"[rng.integers(6)]
    kept = model.get(name, [])
    action = rng.choice(["put", "put", "put", "put", "rebase", "forget"])
    if action == "forget":
      mirror.forget([name])
      model.pop(name, None)
    elif action == "rebase":
      kv = rng.standard_normal((L, K2, rng.integers(1, T), D))
      kv = kv.astype(np.float32)
      mirror.rebase(name, kv)
      model[name] = list(np.moveaxis(kv, 2, 0))
    else:
      data = lanes(rng, 8)
      start = int(rng.integers(0, min(len(kept) + 3, T)))
      length = int(rng.integers(1, min(8, T - start) + 1))
      lane = int(rng.integers(0, 8 - length + 1))
      refused = mirror.put([(name, lane, start, length)], data)
      assert refused == ((name,) if start > len(kept) else ())
      if not refused:
        new = list(np.moveaxis(data[:, lane : lane + length], 1, 0))
        tail = kept[start + length :] if start else []
        model[name] = kept[:start] + new + tail
    assert mirror.records() == {n: len(kv) for n, kv in model.items()}
    for n, kv in model.items():
      np.testing.assert_array_equal(held(mirror, n), np.stack(kv, axis=2))


def test_readers_never_see_half_a_segment():
  shape = (2, 4, 64, 512)
  mirror = KVMirror(shape, "float32")
  stop = threading.Event()

  def write() -> None:
    value = 0
    while not stop.is_set():
      value += 1
      data = np.full((2, 64, 4, 512), value, np.float32)
      mirror.put([("a", 0, 0, 1 + value % 64)], data)
      mirror.forget(["a"] if value % 7 == 0 else [])

  writers = [threading.Thread(target=write) for _ in range(3)]
  for writer in writers:
    writer.start()
  try:
    deadline = time.monotonic() + 30.0
    while mirror.get("a") is None and time.monotonic() < deadline:
      time.sleep(0.001)  # no writer has run yet
    seen = [mirror.get("a") for _ in range(300)]
  finally:
    stop.set()
    for writer in writers:
      writer.join()
  whole = [kv for kv in seen if kv is not None]
  assert whole
  for kv in whole:
    assert kv.min() == kv.max()
    assert kv.shape[2] == 1 + int(kv.max()) % 64


@pytest.fixture
def intake(mirror) -> Intake:
  return Intake(mirror)


def log(intake: Intake, step: int, data: np.ndarray, *layers: int) -> None:
  """Layers of a step, all of them if none is named, the last one first."""
  for layer in layers or reversed(range(L)):
    intake.log(step, layer, None, data[layer])


def test_logged_layers_count_once_they_are_committed(mirror, intake, rng):
  data = lanes(rng, 5)
  log(intake, 0, data)
  assert mirror.records() == {}
  assert mirror.get("a") is None
  intake.commit(0, [("a", 2, 0, 3), ("b", 0, 0, 1)])
  assert mirror.records() == {"a": 3, "b": 1}
  np.testing.assert_array_equal(held(mirror, "a"), data[:, 2:].swapaxes(1, 2))
  np.testing.assert_array_equal(held(mirror, "b")[:, :, 0], data[:, 0])
  more = lanes(rng, 1)
  log(intake, 1, more)
  np.testing.assert_array_equal(held(mirror, "a"), data[:, 2:].swapaxes(1, 2))
  intake.commit(1, [("a", 0, 3, 1)])
  np.testing.assert_array_equal(held(mirror, "a")[:, :, 3], more[:, 0])
  assert intake.take_refused() == []


def test_some_lanes_of_a_step_can_be_logged(mirror, intake, rng):
  data = lanes(rng, 9)
  some = [1, 4, 5, 6]
  for layer in range(L):
    intake.log(0, layer, some, data[layer, some])
  intake.commit(0, [("a", 4, 0, 3), ("b", 1, 0, 1)])
  np.testing.assert_array_equal(held(mirror, "a"), data[:, 4:7].swapaxes(1, 2))
  np.testing.assert_array_equal(held(mirror, "b")[:, :, 0], data[:, 1])


@pytest.mark.parametrize("run", [(5, 3), (0, 1), (1, 2)])
def test_a_segment_of_lanes_that_were_not_logged_is_an_error(
  mirror, intake, rng, run
):
  data = lanes(rng, 4)
  for layer in range(L):
    intake.log(0, layer, [1, 4, 5, 6], data[layer])
  with pytest.raises(ValueError, match="not all logged"):
    intake.commit(0, [("b", 4, 0, 3), ("a", run[0], 0, run[1])])
  assert mirror.records() == {}


def test_a_torn_step_is_refused_by_name_and_changes_nothing(
  mirror, intake, rng
):
  data = lanes(rng, 3)
  log(intake, 0, data)
  intake.commit(0, [("a", 0, 0, 3)])
  torn = lanes(rng, 2)
  log(intake, 1, torn, 0)
  intake.commit(1, [("a", 0, 3, 1), ("b", 1, 0, 1)])
  assert intake.take_refused() == ["a", "b"]
  intake.commit(2, [("c", 0, 0, 1)])  # nothing of it has come
  assert intake.take_refused() == ["c"]
  assert mirror.records() == {"a": 3}
  np.testing.assert_array_equal(held(mirror, "a"), data.swapaxes(1, 2))


def test_a_step_that_runs_again_has_another_id(mirror, intake, rng):
  aborted, again = lanes(rng, 2), lanes(rng, 2)
  log(intake, 0, aborted)
  log(intake, 1, aborted, 0)
  log(intake, 2, again)
  intake.commit(2, [("a", 0, 0, 2)])
  np.testing.assert_array_equal(held(mirror, "a"), again.swapaxes(1, 2))
  log(intake, 0, aborted)  # too late for these
  log(intake, 1, aborted)
  intake.commit(0, [("b", 0, 0, 2)])
  intake.commit(1, [("c", 0, 0, 2)])
  assert intake.take_refused() == ["b", "c"]
  assert mirror.records() == {"a": 2}


def test_a_commit_record_counts_once(mirror, intake, rng):
  data = lanes(rng, 2)
  log(intake, 7, data)
  intake.commit(7, [("a", 0, 0, 2)])
  log(intake, 7, lanes(rng, 2))
  intake.commit(7, [("a", 0, 0, 2)])
  assert intake.take_refused() == []
  np.testing.assert_array_equal(held(mirror, "a"), data.swapaxes(1, 2))


def test_steps_may_overlap(mirror, intake, rng):
  first, second = lanes(rng, 1), lanes(rng, 2)
  for layer in range(L):
    log(intake, 0, first, layer)
    log(intake, 1, second, layer)
  intake.commit(0, [("a", 0, 0, 1)])
  intake.commit(1, [("b", 0, 0, 2)])
  np.testing.assert_array_equal(held(mirror, "a"), first.swapaxes(1, 2))
  np.testing.assert_array_equal(held(mirror, "b"), second.swapaxes(1, 2))


def test_what_is_staged_is_bounded(mirror, intake, rng):
  data = lanes(rng, 1)
  for step in range(3 * STAGED_STEPS):
    log(intake, step, data, 0)
  assert len(intake._staged) == STAGED_STEPS
  log(intake, 3 * STAGED_STEPS - 1, data)
  intake.commit(3 * STAGED_STEPS - 1, [("a", 0, 0, 1)])
  assert intake._staged == {}
  assert mirror.records() == {"a": 1}


def test_a_logged_gap_is_refused_until_it_is_filled(mirror, intake, rng):
  for step, name in enumerate("abc"):
    log(intake, step, lanes(rng, 1))
    intake.commit(step, [(name, 0, 4, 1)])
  intake.rebase("a", np.zeros((L, K2, 5, D), np.float32))
  intake.forget(["b"])
  log(intake, 3, lanes(rng, 1))
  intake.commit(3, [("c", 0, 0, 1)])
  assert intake.take_refused() == []
  assert mirror.records() == {"a": 5, "c": 1}


@pytest.mark.parametrize(
  ("layer", "some", "shape", "dtype"),
  [
    (L, None, (2, K2, D), "float32"),
    (-1, None, (2, K2, D), "float32"),
    (1, None, (2, K2, D + 1), "float32"),
    (1, None, (3, K2, D), "float32"),  # not as the layer before
    (1, [0, 1], (2, K2, D), "float32"),  # neither
    (1, None, (2, D), "float32"),
    (1, None, (), "float32"),
    (1, None, (2, K2, D), "float64"),
  ],
)
def test_a_layer_that_does_not_fit_is_an_error(
  mirror, intake, rng, layer, some, shape, dtype
):
  data = lanes(rng, 2)
  log(intake, 0, data, 0)
  with pytest.raises(ValueError, match="of step 0 is|data is"):
    intake.log(0, layer, some, np.zeros(shape, dtype))
  log(intake, 0, data, 1)
  intake.commit(0, [("a", 0, 0, 2)])
  np.testing.assert_array_equal(held(mirror, "a"), data.swapaxes(1, 2))
