"""The worker's side of a KV checkpoint: it never waits, and never raises."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from resilient_moe.runtime.process import kv_store
from resilient_moe.runtime.process.data import DataClient, DataServer
from resilient_moe.runtime.process.mirror import KVMirror, Segment
from resilient_moe.runtime.process.stream import MAX_QUEUED, KVStream

KEY = b"key of a test"
HOST = "127.0.0.1"
L, K2, T, D = 2, 2, 2048, 64
SHAPE = (L, K2, T, D)
LANES = 12  # of a delta
WAIT_S = 30.0


class Delta:
  """A delta that is not there until it is let go, and counts its readers."""

  def __init__(self, array: np.ndarray, ready: bool = True) -> None:
    self.array = array
    self.read = 0
    self.go = threading.Event()
    if ready:
      self.go.set()

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    self.read += 1
    self.go.wait()
    return self.array


class Gone:
  """A delta whose memory was given away."""

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    raise RuntimeError("this array was deleted")


def until(true: Callable[[], object]) -> None:
  deadline = time.monotonic() + WAIT_S
  while not true():
    assert time.monotonic() < deadline, "it never came"
    time.sleep(0.005)


def pause(store: kv_store.StoreProcess) -> None:
  os.kill(store.process.pid, signal.SIGSTOP)
  os.waitpid(store.process.pid, os.WUNTRACED)  # until all its threads stopped


def delta(rng: np.random.Generator) -> np.ndarray:
  return rng.standard_normal((L, 1, LANES, K2, D)).astype(np.float32)


def serve() -> tuple[DataServer, KVMirror]:
  mirror = KVMirror(SHAPE, "float32")
  return DataServer(HOST, KEY, mirror, {}), mirror


@pytest.fixture
def warnings() -> list[str]:
  return []


@pytest.fixture
def stream(warnings) -> Iterator[KVStream]:
  before = set(threading.enumerate())
  made = KVStream(1, KEY, warnings.append)
  yield made
  made.close()
  until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def held() -> Iterator[tuple[DataServer, KVMirror]]:
  server, mirror = serve()
  yield server, mirror
  server.close()


@pytest.fixture
def mirror(held, stream) -> KVMirror:
  """Where `stream` streams to."""
  stream.target(held[0].address)
  return held[1]


@pytest.fixture
def store(stream) -> Iterator[kv_store.StoreProcess]:
  made = kv_store.start(SHAPE, "float32", KEY)
  stream.target(made.address)
  yield made
  made.close()


def test_the_lanes_that_segments_name_arrive(stream, mirror, rng, warnings):
  first, second = delta(rng), delta(rng)
  stream.put([("a", 4, 0, 5), ("b", 1, 0, 1)], first)
  stream.put([("b", 3, 1, 1), ("a", 0, 5, 1)], Delta(second))
  assert stream.drain(WAIT_S)
  a = np.concatenate([first[:, 0, 4:9], second[:, 0, :1]], axis=1)
  b = np.stack([first[:, 0, 1], second[:, 0, 3]], axis=1)
  np.testing.assert_array_equal(mirror.get("a"), a.swapaxes(1, 2))
  np.testing.assert_array_equal(mirror.get("b"), b.swapaxes(1, 2))
  assert stream.bytes_sent == mirror.nbytes == (6 + 2) * L * K2 * D * 4
  assert (stream.pending, stream.take_refused(), warnings) == (0, set(), [])
  assert stream.alive


def test_a_gap_is_refused_then_rebased(stream, mirror, rng):
  stream.put([("a", 0, 0, 3), ("b", 0, 0, 1)], delta(rng))
  stream.put([("a", 0, 4, 1), ("b", 0, 1, 1)], delta(rng))
  assert stream.drain(WAIT_S)
  assert stream.take_refused() == {"a"}
  assert stream.take_refused() == set()
  kv = rng.standard_normal((L, 5, K2, D)).astype(np.float32)
  stream.rebase("a", kv.swapaxes(1, 2))  # not contiguous, as from a cache
  last = delta(rng)
  stream.put([("a", 0, 5, 1)], last)
  assert stream.drain(WAIT_S)
  assert stream.take_refused() == set()
  whole = np.concatenate([kv, last[:, 0, :1]], axis=1).swapaxes(1, 2)
  np.testing.assert_array_equal(mirror.get("a"), whole)


@pytest.mark.parametrize("steps", [1, 20])
def test_gaps_are_known_without_a_drain(stream, mirror, rng, steps):
  for step in range(steps):
    stream.put([("a", 0, 4 + step, 1)], delta(rng))
  refused: set[str] = set()
  until(lambda: refused.update(stream.take_refused()) or refused)
  assert refused == {"a"}


def test_what_was_rebased_or_forgotten_is_not_refused(stream, mirror, rng):
  stream.put([(n, 0, 4, 1) for n in "abc"], delta(rng))
  assert stream.drain(WAIT_S)
  stream.rebase("a", np.zeros((L, K2, 5, D), np.float32))
  stream.forget(["b"])
  assert stream.drain(WAIT_S)
  assert stream.take_refused() == {"c"}


def test_forgotten_requests_leave_the_mirror(stream, mirror, rng):
  stream.put([("a", 0, 0, 3), ("b", 3, 0, 3)], delta(rng))
  stream.forget(["a"])
  assert stream.drain(WAIT_S)
  assert mirror.records() == {"b": 3}


def test_a_put_does_not_wait_for_its_delta(stream, mirror, rng):
  slow = Delta(delta(rng), ready=False)
  for step in range(5):
    stream.put([("a", 0, step, 1)], slow)
  assert not stream.drain(0.05)
  assert stream.pending == 5
  assert mirror.records() == {}
  slow.go.set()
  assert stream.drain(WAIT_S)
  assert stream.pending == 0
  assert mirror.records() == {"a": 5}


def test_off_means_that_nothing_is_read(stream, mirror, rng, warnings):
  stream.target(None)
  assert not stream.alive
  unread = Delta(delta(rng))
  stream.put([("a", 0, 0, 1)], unread)
  stream.rebase("a", unread)
  stream.forget(["a"])
  assert not stream.drain(WAIT_S)
  assert (unread.read, stream.pending, warnings) == (0, 0, [])


def test_another_target_gets_what_comes_after(
  stream, held, mirror, rng, warnings
):
  slow = Delta(delta(rng), ready=False)
  stream.put([("a", 0, 0, 3)], delta(rng))
  assert stream.drain(WAIT_S)
  stream.put([("a", 0, 3, 1)], slow)
  stream.put([("a", 0, 4, 1)], delta(rng))
  server, other = serve()
  sent = stream.bytes_sent
  stream.target(server.address)
  slow.go.set()
  stream.put([("b", 0, 0, 2)], delta(rng))
  stream.put([("a", 0, 5, 1)], delta(rng))
  assert stream.drain(WAIT_S)
  assert other.records() == {"b": 2}
  assert stream.take_refused() == {"a"}
  assert stream.bytes_sent - sent == 3 * L * K2 * D * 4
  assert held[0].streams_ended(1, WAIT_S), "the old connection is closed"
  assert mirror.records() == {"a": 3}
  assert not server.streams_ended(1, 0.05)
  assert warnings == []
  stream.target(None)
  assert server.streams_ended(1, WAIT_S)
  server.close()


def test_a_dead_store_is_one_warning_and_puts_stay_cheap(
  stream, store, rng, warnings
):
  stream.put([("a", 0, 0, 3)], delta(rng))
  assert stream.drain(WAIT_S)
  store.process.kill()
  store.process.wait()
  step = 3

  def put() -> bool:
    nonlocal step
    stream.put([("a", 0, step, 1)], delta(rng))
    step += 1
    return not stream.alive

  until(put)
  unread = Delta(delta(rng))
  for _ in range(2 * MAX_QUEUED):
    stream.put([("a", 0, step, 1)], unread)
  stream.rebase("a", unread)
  assert not stream.drain(WAIT_S)
  assert (unread.read, stream.pending, stream.alive) == (0, 0, False)
  until(lambda: warnings)
  stream._holder.thread.join(WAIT_S)
  assert len(warnings) == 1
  host, port = store.address
  assert f"KV checkpoints to {host}:{port} stopped" in warnings[0]
  assert "fall back to re-prefill" in warnings[0]


def test_a_store_that_dies_ends_a_drain(stream, store, rng, warnings):
  assert stream.drain(WAIT_S)
  pause(store)
  arrived = []
  drain = lambda: arrived.append(stream.drain(10 * WAIT_S))
  thread = threading.Thread(target=drain)
  thread.start()
  thread.join(0.1)
  assert arrived == []
  store.process.kill()
  thread.join(WAIT_S)
  assert arrived == [False], "long before its time was over"
  until(lambda: warnings)


def test_a_new_target_revives_a_broken_stream(stream, held, rng, warnings):
  stream.target((HOST, 1))  # nobody listens there
  until(lambda: not stream.alive and warnings)
  assert len(warnings) == 1
  stream.target(held[0].address)
  assert stream.alive
  stream.put([("a", 0, 0, 1)], delta(rng))
  assert stream.drain(WAIT_S)
  assert held[1].records() == {"a": 1}


def test_a_wrong_key_is_a_warning(held, warnings):
  stream = KVStream(1, b"another key", warnings.append)
  stream.target(held[0].address)
  until(lambda: not stream.alive and warnings)
  assert "reject" in warnings[0]
  stream.close()


def test_a_stopped_store_does_not_stop_the_steps(stream, store, rng, warnings):
  stream.put([("a", 0, 0, 1), ("b", 0, 0, 1)], delta(rng))
  assert stream.drain(WAIT_S)
  pause(store)
  big = np.ones((L, 1, 64, K2, D), np.float32)
  steps = 3 * MAX_QUEUED
  for step in range(steps):  # 96 MiB, much more than the sockets hold
    segments: list[Segment] = [("a", 0, 1 + step, 1)]
    segments += [("b", 0, 0, 64)] * 2
    stream.put(segments, big)
  assert stream.pending <= MAX_QUEUED + 1
  assert not stream.drain(0.1)
  assert stream.alive
  assert len(warnings) == 1
  assert "behind" in warnings[0]
  assert "re-prefill" in warnings[0]
  os.kill(store.process.pid, signal.SIGCONT)
  assert not stream.drain(WAIT_S), "the oldest were dropped"
  assert stream.take_refused() == {"a"}
  stream.rebase("a", np.full((L, K2, steps + 1, D), 2, np.float32))
  assert stream.drain(WAIT_S)
  client = DataClient(store.address, KEY)
  assert client.records() == {"a": steps + 1, "b": 64}
  (kv,) = client.pull("kv", "a")
  assert (kv == 2).all()
  client.close()
  assert len(warnings) == 1


def test_a_stopped_store_does_not_stop_a_change_of_target(
  stream, store, held, rng, warnings
):
  assert stream.drain(WAIT_S)
  pause(store)
  old = stream._holder.thread
  big = np.ones((L, 1, T, K2, D), np.float32)
  stream.put([("a", 0, 0, T)] * 32, big)  # 64 MiB, more than sockets hold
  stream.put([("a", 0, 0, T)], big)
  until(lambda: stream.pending == 2 and stream._holder._sending)
  stream.target(held[0].address)
  stream.put([("a", 0, 0, 1)], delta(rng))
  assert stream.drain(WAIT_S)
  old.join(WAIT_S)
  assert not old.is_alive()
  assert warnings == []


def test_an_unreadable_delta_leaves_a_gap_and_a_warning(
  stream, mirror, rng, warnings
):
  stream.put([("a", 0, 0, 2)], delta(rng))
  stream.put([("a", 0, 2, 1)], Gone())
  stream.put([("a", 0, 3, 1)], Gone())
  stream.put([("a", 0, 4, 1), ("b", 0, 0, 1)], delta(rng))
  assert not stream.drain(WAIT_S), "a step is missing"
  assert stream.drain(WAIT_S)
  assert mirror.records() == {"a": 2, "b": 1}
  assert stream.take_refused() == {"a"}
  assert len(warnings) == 1
  assert "this array was deleted" in warnings[0]
  assert stream.alive


def test_random_steps_arrive_in_order(stream, mirror, rng):
  model: dict[str, np.ndarray] = {}  # request -> [L, 2K, tokens, d]
  for _ in range(300):
    data = delta(rng)
    segments: list[Segment] = []
    for name in sorted({"abcdef"[i] for i in rng.integers(0, 6, 3)}):
      kept = model.get(name, np.zeros((L, K2, 0, D), np.float32))
      start = 0 if rng.random() < 0.05 else kept.shape[2]
      length = int(rng.integers(1, 6)) if rng.random() < 0.3 else 1
      lane = int(rng.integers(0, LANES - length + 1))
      segments.append((name, lane, start, length))
      new = data[:, 0, lane : lane + length].swapaxes(1, 2)
      model[name] = np.concatenate([kept[:, :, :start], new], axis=2)
    stream.put(segments, data)
    while stream.pending > MAX_QUEUED // 2:
      time.sleep(0.001)
  assert stream.drain(WAIT_S)
  assert mirror.records() == {n: kv.shape[2] for n, kv in model.items()}
  for name, kv in model.items():
    np.testing.assert_array_equal(mirror.get(name), kv)
