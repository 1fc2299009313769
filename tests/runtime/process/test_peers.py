"""An AW's links to the EWs: bytes, ends, wakes, replaced links."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from resilient_moe.datapath.gather import GatherLimits
from resilient_moe.datapath.parcels import Gone, Parcel, Result
from resilient_moe.runtime.process import frames
from resilient_moe.runtime.process.desk import Desk
from resilient_moe.runtime.process.link import Link
from resilient_moe.runtime.process.mirror import named_dtype
from resilient_moe.runtime.process.peers import ComputeFailed, Peers

KEY = b"key of a test"
HOST = "127.0.0.1"
WAIT_S = 30.0

# An EW whose experts double; it ends with its standard input.
EW = """
import sys
from resilient_moe.datapath.gather import GatherLimits
from resilient_moe.runtime.process.desk import Desk
double = lambda layer, rows, token, slot: rows[token] * 2
desk = Desk("127.0.0.1", bytes.fromhex(sys.argv[1]), double, GatherLimits())
print(desk.address[1], flush=True)
sys.stdin.read()
"""


def chosen(layer, rows, token, slot):
  return rows[token]


def parcel(rows: np.ndarray, layer: int = 0) -> Parcel:
  index = np.arange(len(rows), dtype=np.int32)
  return Parcel(layer, rows, index, index)


ONE = parcel(np.ones((1, 4), np.float32))


@pytest.fixture
def desk() -> Iterator[Desk]:
  desk = Desk(HOST, KEY, chosen, GatherLimits())
  yield desk
  desk.close()


@pytest.fixture
def peers() -> Iterator[Peers]:
  peers = Peers(5, 1, KEY, lambda rank: rank == 3)
  yield peers
  peers.close()


@pytest.fixture
def ew() -> Iterator[subprocess.Popen]:
  with subprocess.Popen(
    [sys.executable, "-c", EW, KEY.hex()],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  ) as process:  # fmt: skip
    yield process
    process.kill()


@pytest.fixture
def raw(peers: Peers) -> Iterator[socket.socket]:
  """The other end of a greeted link, as EW 3, to be written by hand."""
  with socket.create_server((HOST, 0)) as listener:
    ends: list[socket.socket] = []

    def welcome() -> None:
      ends.append(listener.accept()[0])
      link = Link(ends[0])
      link.greet(KEY, asks_first=True)
      assert link.receive() == ["aw", 5, 1]
      link.send(["welcome"])
      link._messages.close()

    thread = threading.Thread(target=welcome)
    thread.start()
    peers.connect(3, listener.getsockname(), 1)
    thread.join()
    yield ends[0]
    ends[0].close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_bytes_arrive_as_they_left(desk, peers, rng, dtype):
  peers.connect(3, desk.address, 1)
  shapes = [(3, 5, 7), (1, 1, 1), (64, 512, 130), (2, 3, 0), (0, 4, 0)]
  for ticket, (n, width, m) in enumerate(shapes):
    rows = rng.standard_normal((n, width)).astype(named_dtype(dtype))
    token = rng.integers(0, max(n, 1), m, np.int32)
    peers.send(3, ticket, Parcel(ticket, rows, token, token))
    ((rank, answered, y),) = peers.receive(WAIT_S)
    assert (rank, answered, y.dtype) == (3, ticket, rows.dtype)
    assert y.tobytes() == rows[token].tobytes()


def test_all_of_a_parcel_reaches_the_computation(peers, rng):
  seen: list[tuple] = []

  def watch(layer, rows, token, slot):
    seen.append((layer, rows, token, slot))
    return rows[token]

  # Odd bytes before the indices, and rows that lie in columns.
  rows = np.asfortranarray(rng.random((3, 5))).astype(named_dtype("bfloat16"))
  sent = Parcel(7, rows, np.array([2, 0], np.int32), np.array([8, 1], np.int32))
  desk = Desk(HOST, KEY, watch, GatherLimits())
  peers.connect(3, desk.address, 1)
  peers.send(3, 0, sent)
  assert len(peers.receive(WAIT_S)) == 1
  desk.close()
  assert seen[0][0] == 7
  for got, want in zip(seen[0][1:], sent[1:], strict=True):
    np.testing.assert_array_equal(got, want)


def test_big_parcels_both_ways_at_once_do_not_wait_for_each_other(desk, peers):
  peers.connect(3, desk.address, 1)
  big = [parcel(np.full((512, 2048), i, np.float32)) for i in range(12)]
  for ticket, one in enumerate(big):
    peers.send(3, ticket, one)
  come: list[Result | Gone] = []
  while len(come) < len(big):
    more = peers.receive(WAIT_S)
    assert more
    come += more
  for ticket, result in enumerate(come):
    assert isinstance(result, Result)
    assert result.ticket == ticket
    np.testing.assert_array_equal(result.y, big[ticket].rows)


def test_an_ew_that_is_killed_is_gone_and_the_others_answer(desk, peers, ew):
  peers.connect(3, (HOST, int(ew.stdout.readline())), 1)
  peers.connect(4, desk.address, 1)
  peers.send(3, 0, ONE)
  ((_, _, y),) = peers.receive(WAIT_S)
  np.testing.assert_array_equal(y, ONE.rows * 2)
  os.kill(ew.pid, signal.SIGKILL)
  assert peers.receive(WAIT_S) == [Gone(3, 1)]
  peers.send(3, 1, ONE)
  assert peers.receive(0) == [Gone(3)]
  peers.send(4, 2, ONE)
  ((rank, ticket, _),) = peers.receive(WAIT_S)
  assert (rank, ticket) == (4, 2)
  assert peers.receive(0) == []


@pytest.mark.parametrize("how", ["disconnect", "wake"])
def test_another_thread_ends_a_wait(desk, peers, how):
  peers.connect(3, desk.address, 1)
  come: list[list] = []
  waits = threading.Thread(
    target=lambda: come.append(peers.receive(1e6)), daemon=True
  )
  waits.start()
  # Both orders must do: it may wait already, or not yet.
  getattr(peers, how)(*[3] * (how == "disconnect"))
  waits.join(WAIT_S)
  assert come == [[Gone(3, 1)] if how == "disconnect" else []]


def test_connecting_again_changes_nothing(desk, peers):
  peers.connect(3, desk.address, 1)
  pipe = peers._pipes[3]
  peers.connect(3, desk.address, 1)
  peers.connect(3, desk.address, 0)
  assert peers._pipes[3] is pipe
  assert peers.receive(0) == []


def test_a_new_incarnation_replaces_the_link_whose_end_is_told(desk, peers):
  old = Desk(HOST, KEY, chosen, GatherLimits())
  old.cut(5)
  peers.connect(3, old.address, 1)
  peers.send(3, 0, ONE)
  peers.connect(3, desk.address, 2)
  assert peers.receive(0) == [Gone(3, 1)]
  old.close()
  peers.send(3, 1, ONE)
  assert [r.ticket for r in peers.receive(WAIT_S)] == [1]


def test_a_link_that_ended_can_be_opened_again(desk, peers):
  peers.connect(3, desk.address, 1)
  peers.disconnect(3)
  peers.disconnect(3)
  assert peers.receive(WAIT_S) == [Gone(3, 1)]
  peers.connect(3, desk.address, 1)
  peers.send(3, 1, ONE)
  assert [r.ticket for r in peers.receive(WAIT_S)] == [1]


def test_an_ew_that_is_not_there_is_named(peers):
  with socket.create_server((HOST, 0)) as listener:
    address = listener.getsockname()
  with pytest.raises(ConnectionError, match=f"EW 3 at {HOST}:{address[1]}"):
    peers.connect(3, address, 1)


@pytest.mark.parametrize(
  ("data", "complaint"),
  [
    (b"x" * frames._HEADER.size, "no frame begins with b'xxxxxxxx'"),
    (b"r" + bytes(frames._HEADER.size - 1), "no frame begins with"),
    (
      frames._HEADER.pack(b"rmoe", 1, 1, 0, 0, 0, 1 << 20, 0, 1 << 20),
      r"4398046511104 bytes \(n=1048576, m=0, D=1048576\) is beyond",
    ),
    (
      frames._HEADER.pack(b"rmoe", 0, 1, 0, 0, 0, 1, 1, 1) + bytes(12),
      "can't send a frame of kind 0",
    ),
  ],
  ids=["text", "magic", "size", "kind"],
)
def test_an_ew_that_talks_nonsense_is_gone(peers, raw, data, complaint):
  raw.sendall(data)
  assert peers.receive(WAIT_S) == [Gone(3, 1)]
  with pytest.raises(ValueError, match="EW 3: .*" + complaint):
    raise ValueError(*peers.complaints)


def test_a_frame_in_pieces_is_one_answer(peers, raw):
  y = np.arange(6, dtype=np.float32).reshape(2, 3)
  data = b"".join(frames.Frame(frames.RESULT, 9, 0, False, y).buffers())
  for byte in data[:-1]:
    raw.sendall(bytes([byte]))
    assert peers.receive(0) == []
  raw.sendall(data[-1:] + data)
  come = peers.receive(WAIT_S)
  come += peers.receive(WAIT_S) if len(come) == 1 else []
  assert [(r.rank, r.ticket, r.y.tolist()) for r in come] == [
    (3, 9, y.tolist())
  ] * 2


def test_what_came_beside_a_failure_is_kept(peers, raw):
  def fail(layer, rows, token, slot):
    raise LookupError("no such slot")

  desk = Desk(HOST, KEY, fail, GatherLimits())
  peers.connect(4, desk.address, 1)
  peers.send(4, 1, ONE)
  y = np.ones((1, 1), np.float32)
  raw.sendall(b"".join(frames.Frame(frames.RESULT, 2, 0, False, y).buffers()))
  for rank in (3, 4):  # both are here before either is read
    assert select.select([peers._pipes[rank]._end], [], [], WAIT_S)[0]
  with pytest.raises(ComputeFailed, match="EW 4.*no such slot"):
    peers.receive(WAIT_S)
  assert [r.ticket for r in peers.receive(WAIT_S)] == [2]
  desk.close()


def test_answers_around_a_failure_are_kept(peers, raw):
  y = np.ones((1, 1), np.float32)
  text = np.frombuffer(b"no such slot", np.uint8)[:, None]
  for kind, ticket, data in [(1, 1, y), (2, 2, text), (1, 3, y)]:
    raw.sendall(b"".join(frames.Frame(kind, ticket, 0, False, data).buffers()))
  raw.shutdown(socket.SHUT_WR)
  come: list = []
  failures: list[ComputeFailed] = []
  while Gone(3, 1) not in come:
    try:
      come += peers.receive(WAIT_S)
    except ComputeFailed as error:
      failures.append(error)
  assert [r.ticket for r in come[:-1]] == [1, 3]
  (failure,) = failures
  assert (failure.rank, failure.ticket) == (3, 2)
  assert str(failure) == "EW 3, ticket 2: no such slot"


@pytest.mark.parametrize(
  ("wrong", "named"),
  [
    ({"rows": np.zeros((2, 3), np.int64)}, "int64"),
    ({"rows": np.zeros(3, np.float32)}, r"data \(3,\)"),
    ({"slot": np.zeros(3, np.int32)}, r"slot \(3,\)"),
    ({"rows": np.zeros((1 << 20, 128), np.float32)}, "beyond the limit"),
  ],
)
def test_a_parcel_that_no_frame_can_carry_is_refused(desk, peers, wrong, named):
  peers.connect(3, desk.address, 1)
  with pytest.raises(ValueError, match=named):
    peers.send(3, 0, ONE._replace(**wrong))
  peers.send(3, 1, ONE)
  assert [r.ticket for r in peers.receive(WAIT_S)] == [1]


def test_answers_is_what_was_passed(peers):
  assert peers.answers(3)
  assert not peers.answers(4)


@pytest.mark.parametrize(
  "y", [np.zeros((2, 4), np.float32), np.zeros(1), np.zeros((1, 4), np.int64)],
  ids=["rows", "dimensions", "dtype"],
)  # fmt: skip
def test_a_computation_must_return_one_row_an_assignment(peers, y):
  desk = Desk(HOST, KEY, lambda *_: y, GatherLimits())
  peers.connect(3, desk.address, 1)
  peers.send(3, 1, ONE)
  with pytest.raises(ComputeFailed, match="EW 3, ticket 1: ValueError"):
    peers.receive(WAIT_S)
  desk.close()


def test_the_end_of_an_ew_is_told(desk, peers):
  peers.connect(3, desk.address, 1)
  desk.close()
  assert peers.receive(WAIT_S) == [Gone(3, 1)]
