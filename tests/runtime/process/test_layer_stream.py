"""Steps that are streamed layer by layer, when the link has time for them."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from resilient_moe.runtime.process import kv_store
from resilient_moe.runtime.process.data import DataClient, DataServer
from resilient_moe.runtime.process.mirror import KVMirror
from resilient_moe.runtime.process.stream import MAX_QUEUED, POLL_S, KVStream

KEY = b"key of a test"
HOST = "127.0.0.1"
L, K2, T, D = 3, 4, 512, 16
SHAPE = (L, K2, T, D)
TOKEN_BYTES = L * K2 * D * 4
WAIT_S = 30.0

# Commits steps of value p + 1, then logs half of the next one and waits.
TORN = """
import sys, time
import numpy as np
from resilient_moe.runtime.process.stream import KVStream
stream = KVStream(3, bytes.fromhex(sys.argv[2]), print)
stream.target(("127.0.0.1", int(sys.argv[1])))
for p in range(6):
  for layer in range(3 if p < 5 else 2):
    stream.log(p, layer, np.full((1, 4, 16), p + 1, np.float32))
  if p < 5:
    stream.commit(p, [("a", 0, p, 1)])
assert stream.drain(30.0)
print("torn", flush=True)
time.sleep(60)
"""


class Gate:
  """A link that is idle or not, and counts who asks."""

  def __init__(self, idle: bool) -> None:
    self.idle = idle
    self.asked = 0

  def __call__(self) -> bool:
    self.asked += 1
    return self.idle


class Gone:
  """An array whose memory was given away."""

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    raise RuntimeError("this array was deleted")


def until(true: Callable[[], object]) -> None:
  deadline = time.monotonic() + WAIT_S
  while not true():
    assert time.monotonic() < deadline, "it never came"
    time.sleep(0.005)


def lanes(rng: np.random.Generator, count: int) -> np.ndarray:
  return rng.standard_normal((L, count, K2, D)).astype(np.float32)


def log(stream: KVStream, step: int, data: np.ndarray, layers: int = L) -> None:
  for layer in range(layers):
    stream.log(step, layer, data[layer])


@pytest.fixture
def warnings() -> list[str]:
  return []


@pytest.fixture
def server() -> Iterator[DataServer]:
  made = DataServer(HOST, KEY, KVMirror(SHAPE, "float32"), {})
  yield made
  assert made.complaints == []
  made.close()


@pytest.fixture
def mirror(server) -> KVMirror:
  return server._mirror


@pytest.fixture
def make(server, warnings) -> Iterator[Callable[..., KVStream]]:
  made = []
  before = set(threading.enumerate())

  def make(*args: object) -> KVStream:
    stream = KVStream(1, KEY, warnings.append, *args)
    stream.target(server.address)
    made.append(stream)
    return stream

  yield make
  for stream in made:
    stream.close()
  until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def stream(make) -> KVStream:
  return make()


@pytest.fixture
def start() -> Iterator[Callable[..., kv_store.StoreProcess]]:
  made = []

  def start(**options: float) -> kv_store.StoreProcess:
    made.append(kv_store.start(SHAPE, "float32", KEY, **options))
    return made[-1]

  yield start
  for store in made:
    store.close()


def test_a_logged_step_arrives_when_it_is_committed(
  stream, mirror, rng, warnings
):
  data = lanes(rng, 5)
  log(stream, 0, data)
  assert stream.drain(WAIT_S)
  assert mirror.records() == {}
  stream.commit(0, [("a", 1, 0, 3), ("b", 4, 0, 1)])
  assert stream.drain(WAIT_S)
  np.testing.assert_array_equal(mirror.get("a"), data[:, 1:4].swapaxes(1, 2))
  np.testing.assert_array_equal(mirror.get("b")[:, :, 0], data[:, 4])
  assert (stream.pending, stream.take_refused(), warnings) == (0, set(), [])
  assert stream.bytes_sent == mirror.nbytes == data.nbytes


def test_only_the_lanes_that_are_used_are_sent(stream, mirror, rng):
  data = lanes(rng, 64)
  some = np.array([3, 9, 10, 11])
  for layer in range(L):
    stream.log(0, layer, data[layer], some)
  stream.commit(0, [("a", 9, 0, 3), ("b", 3, 0, 1)])
  assert stream.drain(WAIT_S)
  np.testing.assert_array_equal(mirror.get("a"), data[:, 9:12].swapaxes(1, 2))
  np.testing.assert_array_equal(mirror.get("b")[:, :, 0], data[:, 3])
  # 2 * H_kv * d values of each token and layer, and nothing else
  assert stream.bytes_sent == len(some) * TOKEN_BYTES


def test_whole_steps_and_logged_ones_follow_each_other(stream, mirror, rng):
  data = lanes(rng, 4)
  stream.put([("a", 0, 0, 2)], data[:, None])
  log(stream, 0, data)
  stream.commit(0, [("a", 2, 2, 1)])
  stream.put([("a", 3, 3, 1)], data[:, None])
  assert stream.drain(WAIT_S)
  np.testing.assert_array_equal(mirror.get("a"), data.swapaxes(1, 2))
  assert stream.bytes_sent == (2 + 4 + 1) * TOKEN_BYTES


def test_an_aborted_step_leaves_nothing(stream, mirror, rng):
  log(stream, 0, lanes(rng, 1), layers=2)
  log(stream, 1, lanes(rng, 1))
  data = lanes(rng, 1)
  log(stream, 2, data)
  stream.commit(2, [("a", 0, 0, 1)])
  assert stream.drain(WAIT_S)
  np.testing.assert_array_equal(mirror.get("a"), data.swapaxes(1, 2))
  assert stream.take_refused() == set()


def test_a_torn_step_is_refused_and_rebased(stream, mirror, rng, warnings):
  log(stream, 0, lanes(rng, 1), layers=2)
  stream.log(0, 2, Gone())
  stream.commit(0, [("a", 0, 0, 1)])
  refused: set[str] = set()
  until(lambda: refused.update(stream.take_refused()) or refused)
  assert refused == {"a"}
  assert mirror.records() == {}
  assert ["this array was deleted" in text for text in warnings] == [True]
  stream.rebase("a", np.ones((L, K2, 1, D), np.float32))
  log(stream, 1, lanes(rng, 1))
  stream.commit(1, [("a", 0, 1, 1)])
  stream.drain(WAIT_S)  # something is missing since the last one
  assert stream.drain(WAIT_S)
  assert stream.take_refused() == set()
  assert mirror.records() == {"a": 2}


def test_a_step_logged_to_two_targets_is_torn(stream, server, rng):
  other = DataServer(HOST, KEY, KVMirror(SHAPE, "float32"), {})
  data = lanes(rng, 1)
  log(stream, 0, data, layers=2)
  assert stream.drain(WAIT_S)
  stream.target(other.address)
  stream.log(0, 2, data[2])
  stream.commit(0, [("a", 0, 0, 1)])
  assert stream.drain(WAIT_S)
  assert stream.take_refused() == {"a"}
  assert stream.bytes_sent == data.nbytes, "to either"
  assert other._mirror.records() == {}
  stream.close()
  other.close()


def test_what_a_killed_process_had_not_committed_is_gone(server, mirror):
  process = subprocess.Popen(
    [sys.executable, "-c", TORN, str(server.address[1]), KEY.hex()],
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout is not None
  assert process.stdout.readline() == "torn\n"
  process.kill()
  assert server.streams_ended(3, WAIT_S)
  process.communicate()
  client = DataClient(server.address, KEY)
  assert client.records() == {"a": 5}
  (kv,) = client.pull("kv", "a")
  for p in range(5):
    assert (kv[:, :, p] == p + 1).all()
  client.close()


# -- the link's idle time


def test_nothing_is_sent_while_the_link_is_busy(make, mirror, rng):
  gate = Gate(idle=False)
  stream = make(gate, WAIT_S)
  data = lanes(rng, 1)
  log(stream, 0, data)
  stream.commit(0, [("a", 0, 0, 1)])
  stream.put([("b", 0, 0, 1)], data[:, None])
  time.sleep(0.2)
  assert stream.bytes_sent == 0
  assert stream.pending == 2
  assert 1 < gate.asked < 0.25 / POLL_S, "it spins"
  gate.idle = True
  stream.wake()
  assert stream.drain(WAIT_S)
  assert mirror.records() == {"a": 1, "b": 1}


@pytest.mark.parametrize("kind", ["put", "log", "rebase"])
def test_all_kv_waits_for_the_link_and_words_do_not(make, server, rng, kind):
  gate = Gate(idle=False)
  stream = make(gate, WAIT_S)
  stream.forget(["a"])
  assert stream.drain(WAIT_S), "words are short"
  data = lanes(rng, 1)
  give = {
    "put": lambda: stream.put([("a", 0, 0, 1)], data[:, None]),
    "log": lambda: stream.log(0, 0, data[0]),
    "rebase": lambda: stream.rebase("a", data.swapaxes(1, 2)),
  }
  give[kind]()
  assert not stream.drain(0.1)
  assert stream.bytes_sent == 0
  gate.idle = True
  assert stream.drain(WAIT_S)
  assert stream.bytes_sent


def test_the_link_is_asked_for_every_layer(make, mirror, rng):
  stream = make(lambda: stream.bytes_sent < TOKEN_BYTES // L, WAIT_S)
  log(stream, 0, lanes(rng, 1))
  until(lambda: stream.bytes_sent)
  time.sleep(0.1)
  assert stream.bytes_sent == TOKEN_BYTES // L


def test_a_wake_is_noticed_at_once(make, mirror, rng, monkeypatch):
  monkeypatch.setattr("resilient_moe.runtime.process.stream.POLL_S", WAIT_S)
  gate = Gate(idle=False)
  stream = make(gate, WAIT_S)
  stream.log(0, 0, lanes(rng, 1)[0])
  until(lambda: gate.asked)
  time.sleep(0.05)
  gate.idle = True
  woken = time.monotonic()
  stream.wake()
  until(lambda: stream.bytes_sent)
  assert time.monotonic() - woken < WAIT_S / 4


def test_a_link_that_is_never_idle_costs_patience_once(make, mirror, rng):
  gate = Gate(idle=False)
  stream = make(gate, 0.2)
  began = time.monotonic()
  for step in range(40):
    log(stream, step, lanes(rng, 1))
    stream.commit(step, [("a", 0, step, 1)])
  handed_over = time.monotonic() - began
  assert stream.drain(WAIT_S)
  took = time.monotonic() - began
  assert 0.2 <= took < 0.2 + handed_over + 4.0, "120 layers, one wait"
  assert mirror.records() == {"a": 40}


def test_a_held_stream_ends_at_once(make, server, warnings):
  stream = make(lambda: False, WAIT_S)
  stream.log(0, 0, Gone())
  until(lambda: stream._holder._sending is not None)
  began = time.monotonic()
  stream.close()
  assert time.monotonic() - began < 3.0
  assert server.streams_ended(1, WAIT_S)
  assert warnings == [], "what was held back is not read any more"


def test_an_idle_that_fails_is_a_warning(make, rng, warnings):
  def fail() -> bool:
    raise RuntimeError("who knows")

  stream = make(fail, WAIT_S)
  log(stream, 0, lanes(rng, 1))
  until(lambda: warnings)
  assert not stream.alive
  assert "who knows" in warnings[0]


# -- a store that is slow or dies


def test_a_slow_store_never_blocks_the_steps(stream, start, rng, warnings):
  store = start(delay_s=0.02)
  stream.target(store.address)
  data = lanes(rng, 1)
  stream.put([("b", 0, 0, 1)], data[:, None])
  assert stream.drain(WAIT_S)
  wide = np.repeat(data, 64, axis=1)  # 96 MiB in all: no socket holds that
  longest = 0.0
  for step in range(8 * MAX_QUEUED // L):
    began = time.monotonic()
    log(stream, step, wide)
    stream.commit(step, [("a", 0, step, 1)])
    longest = max(longest, time.monotonic() - began)
  assert longest < 2.0, "all together take a minute"
  assert stream.pending <= MAX_QUEUED + 1
  assert ["behind" in text for text in warnings] == [True]
  refused: set[str] = set()
  until(lambda: refused.update(stream.take_refused()) or refused)
  assert refused == {"a"}
  client = DataClient(store.address, KEY)
  assert client.records()["b"] == 1
  client.close()
  assert stream.alive
  assert len(warnings) == 1, "it is said once"


def test_a_store_that_dies_in_mid_step_is_a_warning(
  stream, start, rng, warnings
):
  store = start()
  stream.target(store.address)
  log(stream, 0, lanes(rng, 1), layers=2)
  assert stream.drain(WAIT_S)
  store.process.kill()
  store.process.wait()
  for step in range(1, 100):
    log(stream, step, lanes(rng, 1))
    stream.commit(step, [("a", 0, step, 1)])
  until(lambda: not stream.alive and warnings)
  assert stream.pending == 0
  assert not stream.drain(WAIT_S)
  (text,) = warnings
  assert "stopped" in text
  assert "fall back to re-prefill" in text
