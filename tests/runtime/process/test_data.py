"""Pulls and streams between processes: whole, or not at all."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from resilient_moe.runtime.process.data import (
  DataClient,
  DataServer,
  PullFailed,
)
from resilient_moe.runtime.process.link import (
  Address,
  Link,
  aligned_empty,
  dial,
)
from resilient_moe.runtime.process.mirror import KVMirror, named_dtype

KEY = b"key of a test"
HOST = "127.0.0.1"
SHAPE = (2, 2, 64, 1 << 16)  # a position is 1 MiB
WAIT_S = 30.0

# Streams positions of value p + 1, as fast as they are taken.
STREAMER = """
import sys, time
import numpy as np
from resilient_moe.runtime.process.stream import KVStream
stream = KVStream(3, bytes.fromhex(sys.argv[2]), print)
stream.target(("127.0.0.1", int(sys.argv[1])))
for p in range(64):
  delta = np.full((2, 1, 1, 2, 1 << 16), p + 1, np.float32)
  stream.put([("a", 0, p, 1)], delta)
  while stream.pending > 2:
    time.sleep(0.001)
time.sleep(60)
"""

# Streams three whole positions and half of the next.
HALF = """
import sys, time
import numpy as np
from resilient_moe.runtime.process.link import dial
link = dial(("127.0.0.1", int(sys.argv[1])), 10.0)
link.greet(bytes.fromhex(sys.argv[2]), asks_first=False)
link.send(["hello", 3])
data = np.ones((2, 1, 2, 1 << 16), np.float32)
for p in range(3):
  link.send(["put", [("a", 0, p, 1)]], [data])
link.send(["put", [("a", 0, 3, 1)], [(data.shape, "<f4")]])
link._socket.sendall(data.tobytes()[: data.nbytes // 2])
print("half", flush=True)
time.sleep(60)
"""


def until(true: Callable[[], object]) -> None:
  deadline = time.monotonic() + WAIT_S
  while not true():
    assert time.monotonic() < deadline, "it never came"
    time.sleep(0.005)


def child(code: str, address: Address) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", code, str(address[1]), KEY.hex()],
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip


@pytest.fixture
def mirror() -> KVMirror:
  return KVMirror(SHAPE, "float32")


@pytest.fixture
def stored() -> dict[str, list[np.ndarray]]:
  return {}


@pytest.fixture
def slow() -> threading.Event:
  return threading.Event()


@pytest.fixture
def server(mirror, stored, slow) -> Iterator[DataServer]:
  def fail() -> list[np.ndarray]:
    raise ValueError("expert 7 is not here")

  def wait() -> list[np.ndarray]:
    slow.wait()
    return [np.zeros(1)]

  reads = {"stored": lambda name: stored[name], "fail": fail, "wait": wait}
  made = DataServer(HOST, KEY, mirror, reads)
  yield made
  slow.set()
  made.close()
  made.close()  # a second time is fine


@pytest.fixture
def client(server) -> Iterator[DataClient]:
  made = DataClient(server.address, KEY)
  yield made
  made.close()


def streaming(server: DataServer, rank: int = 3) -> Link:
  link = dial(server.address, WAIT_S)
  link.greet(KEY, asks_first=False)
  link.send(["hello", rank])
  return link


def test_arrays_come_back_bit_equal_and_aligned(client, stored, rng):
  half = rng.standard_normal((3, 5)).astype(named_dtype("bfloat16"))
  stored["all"] = [
    rng.standard_normal((4, 512, 512)).astype(np.float32),  # 4 MiB
    np.array(-7),
    np.zeros((0, 3)),
    rng.integers(0, 2, (3, 7)).astype(bool),
    rng.integers(0, 9, (3, 700), dtype=np.int64).T,
    half,
    rng.standard_normal((17, 1001)),
  ]
  back = client.pull("stored", "all")
  assert len(back) == len(stored["all"])
  for ours, theirs in zip(back, stored["all"], strict=True):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.tobytes() == theirs.tobytes()
    assert ours.ctypes.data % 64 == 0 or not ours.size
    assert ours.flags.writeable


def test_a_read_may_return_nothing(client, stored):
  stored["none"] = []
  assert client.pull("stored", "none") == []


def test_the_mirror_is_read(client, mirror):
  data = np.ones((2, 3, 2, 1 << 16), np.float32)
  mirror.put([("a", 0, 0, 3)], data)
  (kv,) = client.pull("kv", "a")
  np.testing.assert_array_equal(kv, data.swapaxes(1, 2))
  assert client.records() == {"a": 3}
  with pytest.raises(PullFailed, match="request 'b'"):
    client.pull("kv", "b")


def test_a_failed_read_carries_its_reason(client, stored):
  stored["x"] = [np.arange(3)]
  with pytest.raises(PullFailed, match="ValueError: expert 7 is not here"):
    client.pull("fail")
  with pytest.raises(PullFailed, match=r"'nonsense'.*stored, fail, wait"):
    client.pull("nonsense")
  with pytest.raises(PullFailed, match="TypeError"):
    client.pull("stored")
  link = client._link
  (back,) = client.pull("stored", "x")
  np.testing.assert_array_equal(back, stored["x"][0])
  assert client._link is link, "a failed read costs no connection"


def test_a_server_without_a_mirror_keeps_no_kv():
  server = DataServer(HOST, KEY, None, {})
  client = DataClient(server.address, KEY)
  with pytest.raises(PullFailed, match="unknown"):
    client.pull("kv", "a")
  link = streaming(server)
  assert server.streams_ended(3, WAIT_S)
  assert "mirror" in server.complaints[0]
  link.close()
  client.close()
  server.close()


def test_a_dead_peer_is_a_connection_error(client, server, stored):
  stored["x"] = [np.arange(3)]
  client.pull("stored", "x")
  server.close()
  port = server.address[1]
  for _ in range(2):  # on the old connection, and on a new one
    with pytest.raises(ConnectionError, match=rf"'stored' from .*:{port}"):
      client.pull("stored", "x")


def test_a_slow_read_is_a_connection_error_and_the_next_pull_works(
  client, slow, stored
):
  stored["x"] = [np.arange(3)]
  with pytest.raises(ConnectionError, match=r"'wait'.*no answer in 0.2 s"):
    client.pull("wait", timeout_s=0.2)
  slow.set()
  (back,) = client.pull("stored", "x")
  np.testing.assert_array_equal(back, stored["x"][0])


def test_a_peer_that_stalls_inside_an_array_is_a_connection_error():
  listener = socket.create_server((HOST, 0))

  def stall() -> None:
    link = Link(listener.accept()[0])
    link.greet(KEY, asks_first=True)
    link.receive()
    link.send(["arrays", [[[1000], "<f4"]]])
    link._socket.sendall(bytes(100))
    with pytest.raises(EOFError):
      link.receive()  # until the client gives up
    link.close()

  thread = threading.Thread(target=stall)
  thread.start()
  client = DataClient(listener.getsockname(), KEY)
  with pytest.raises(ConnectionError, match="no answer"):
    client.pull("x", timeout_s=0.3)
  thread.join(WAIT_S)
  assert not thread.is_alive()
  listener.close()


def test_a_wrong_key_is_refused_and_the_server_goes_on(client, server, stored):
  stored["x"] = [np.arange(3)]
  stranger = DataClient(server.address, b"another key")
  with pytest.raises(ConnectionError, match="reject"):
    stranger.pull("stored", "x")
  assert len(client.pull("stored", "x")) == 1
  until(lambda: server.complaints)  # it learns after it has refused
  assert "wrong key" in server.complaints[0]


@pytest.mark.parametrize(
  "words",
  [
    b"",
    b"\x00\x00\x00\x05hello",
    b"\xff" * 400,
    b"\x00\x00\x00\xc8ab",  # torn
  ],
)
def test_strangers_do_not_end_the_server(client, server, stored, words):
  stored["x"] = [np.arange(3)]
  with socket.create_connection(server.address) as stranger:
    stranger.sendall(words)
    assert len(client.pull("stored", "x")) == 1
  assert server.streams_ended(0, WAIT_S)


@pytest.mark.parametrize(
  "message",
  [
    ["pull"],
    ["hello", "me"],
    ["nonsense", 1, []],
    [],
    ["hello", 3, "put", 0],
  ],
)
def test_nonsense_ends_only_its_own_connection(client, server, stored, message):
  stored["x"] = [np.arange(3)]
  link = dial(server.address, WAIT_S)
  link.greet(KEY, asks_first=False)
  link.send(message)
  if message[2:3] == ["put"]:  # a stream that goes wrong later
    link.send(["put", [["a", 0, 0, 1]], [[[-5], "<f4"]]])
  with pytest.raises((EOFError, OSError)):
    link.receive()
  assert len(client.pull("stored", "x")) == 1
  assert len(server.complaints) == 1
  link.close()


def test_a_stream_fills_the_mirror_and_learns_of_gaps(server, mirror):
  link = streaming(server)
  data = np.ones((2, 2, 2, 1 << 16), np.float32)
  link.send(["put", [("a", 0, 0, 2), ("b", 0, 4, 1), ("c", 0, 9, 1)]], [data])
  link.send(["put", [("d", 0, 2, 1), ("e", 0, 2, 1)]], [data])
  link.send(["rebase", "c"], [np.ones((2, 2, 10, 1 << 16), np.float32)])
  link.send(["forget", ["d"]])
  link.send(["put", [("e", 0, 0, 1)]], [data])
  link.send(["flush", 5])
  assert link.receive() == ["flushed", 5, ["b"]]
  assert mirror.records() == {"a": 2, "c": 10, "e": 1}
  link.send(["flush", 6])
  assert link.receive() == ["flushed", 6, []]
  link.close()


def test_streams_end_when_all_of_a_rank_did(server):
  assert server.streams_ended(3, 0.0)
  first, second, other = (streaming(server, r) for r in (3, 3, 4))
  first.close()
  assert not server.streams_ended(3, 0.1)
  second.close()
  assert server.streams_ended(3, WAIT_S)
  assert not server.streams_ended(4, 0.1)
  other.close()
  assert server.streams_ended(4, WAIT_S)


def test_a_connection_that_has_not_said_its_rank_counts(server):
  with server._changed:  # nothing is accepted meanwhile
    waiting = socket.create_connection(server.address)
    assert not server._ended(3)
  assert not server.streams_ended(3, 0.1)
  waiting.close()
  assert server.streams_ended(3, WAIT_S)


def test_a_client_can_wait_for_the_end_of_streams(client, server):
  link = streaming(server)
  assert not client.streams_ended(3, 0.1)
  link.close()
  assert client.streams_ended(3, WAIT_S)


def test_what_a_killed_process_had_sent_can_be_restored(server, mirror):
  process = child(STREAMER, server.address)
  until(lambda: mirror.records().get("a", 0) >= 3)
  os.kill(process.pid, signal.SIGKILL)
  assert server.streams_ended(3, WAIT_S)
  process.communicate()
  tokens = mirror.records()["a"]
  kv = mirror.get("a")
  assert kv is not None
  assert kv.shape[2] == tokens >= 3
  for p in range(tokens):
    assert (kv[:, :, p] == p + 1).all()
  assert server.complaints == []


def test_a_torn_message_has_no_effect(server, mirror):
  process = child(HALF, server.address)
  assert process.stdout is not None
  assert process.stdout.readline() == "half\n"
  until(lambda: mirror.records() == {"a": 3})
  assert not server.streams_ended(3, 0.2)
  os.kill(process.pid, signal.SIGKILL)
  assert server.streams_ended(3, WAIT_S)
  process.communicate()
  assert mirror.records() == {"a": 3}
  assert not mirror._records["a"].kv[:, :, 3].any()
  assert server.complaints == []


def test_room_of_a_negative_size_is_refused():
  with pytest.raises(ValueError, match="negative size"):
    aligned_empty((-5,), np.dtype("float32"))


def test_close_ends_the_threads():
  before = set(threading.enumerate())
  server = DataServer(HOST, KEY, KVMirror(SHAPE, "float32"), {})
  client = DataClient(server.address, KEY)
  client.records()
  links = [streaming(server), dial(server.address, WAIT_S)]
  until(lambda: len(set(threading.enumerate()) - before) == 4)
  server.close()
  assert set(threading.enumerate()) <= before
  assert server.streams_ended(3, 0.0)
  client.close()
  for link in links:
    link.close()


def test_a_client_closed_elsewhere_ends_its_pull(client, server):
  raised: list[str] = []

  def pull() -> None:
    with pytest.raises(ConnectionError) as caught:
      client.pull("wait", timeout_s=WAIT_S)
    raised.append(str(caught.value))

  thread = threading.Thread(target=pull)
  thread.start()
  until(lambda: server._open and None not in server._open.values())
  client.close()
  thread.join(2 * WAIT_S)
  assert raised
  assert "no answer" not in raised[0]
