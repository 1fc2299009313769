"""An EW's side: who is served, who is refused, and what doesn't stop it."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from resilient_moe.datapath.gather import GatherLimits
from resilient_moe.datapath.parcels import Gone, Parcel
from resilient_moe.runtime.process import frames, reception
from resilient_moe.runtime.process.desk import Desk
from resilient_moe.runtime.process.link import dial
from resilient_moe.runtime.process.peers import ComputeFailed, Peers

KEY = b"key of a test"
HOST = "127.0.0.1"
WAIT_S = 30.0
EW = 3
TOGETHER = GatherLimits(min_rows=1000)  # waits for every live AW

# An AW that has sent a parcel, and then lives until it is killed.
AW = """
import sys, time
import numpy as np
from resilient_moe.datapath.parcels import Parcel
from resilient_moe.runtime.process.peers import Peers
peers = Peers(0, 1, bytes.fromhex(sys.argv[2]), lambda rank: True)
peers.connect(3, ("127.0.0.1", int(sys.argv[1])), 1)
print("linked", flush=True)
time.sleep(600)
"""


class Experts:
  """A computation that can be held, and fails on negative rows."""

  def __init__(self) -> None:
    self.began, self.go = threading.Event(), threading.Event()
    self.go.set()

  def __call__(self, layer, rows, token, slot):
    self.began.set()
    assert self.go.wait(WAIT_S)
    if (rows < 0).any():
      raise ArithmeticError("a negative row")
    return rows[token] + slot[:, None]


class Lab:
  """A desk, its AWs, and what it computed."""

  def __init__(self) -> None:
    self.experts = Experts()
    self.batches: list[tuple] = []
    self._ends: list = []

  def desk(self, limits: GatherLimits = GatherLimits()) -> Desk:  # noqa: B008
    on_batch = lambda *batch: self.batches.append(batch)
    self._desk = Desk(HOST, KEY, self.experts, limits, on_batch)
    self._ends.append(self._desk)
    return self._desk

  def aw(self, rank: int, incarnation: int = 1, key: bytes = KEY) -> Peers:
    peers = Peers(rank, incarnation, key, lambda ew: True)
    self._ends.insert(0, peers)
    peers.connect(EW, self._desk.address, 1)
    return peers

  def close(self) -> None:
    self.experts.go.set()
    for end in self._ends:
      end.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
  lab = Lab()
  yield lab
  lab.close()


def parcel(value: float, layer: int = 0, n: int = 2) -> Parcel:
  index = np.arange(n, dtype=np.int32)
  return Parcel(layer, np.full((n, 4), value, np.float32), index, index)


def answer(aw: Peers, ticket: int, value: float) -> None:
  """Expects one answer, to that parcel."""
  (result,) = aw.receive(WAIT_S)
  assert (result.rank, result.ticket) == (EW, ticket)
  np.testing.assert_array_equal(result.y[:, 0], value + np.arange(2))


def serves(aw: Peers, times: int = 20) -> None:
  """Round trips, as a clock that counts what the desk has done."""
  for ticket in range(1000, 1000 + times):
    aw.send(EW, ticket, parcel(ticket))
    answer(aw, ticket, ticket)


def until(true: Callable[[], object]) -> None:
  deadline = time.monotonic() + WAIT_S
  while not true():
    assert time.monotonic() < deadline, "it never came"
    time.sleep(0.005)


def test_several_aws_are_one_batch_and_each_gets_its_part(lab):
  desk = lab.desk(TOGETHER)
  aws = [lab.aw(rank) for rank in range(4)]
  assert desk.live == {0, 1, 2, 3}
  for aw, value in zip(aws, (10, 20, 30, 40), strict=True):
    aw.send(EW, value, parcel(value, layer=6))
  for aw, value in zip(aws, (10, 20, 30, 40), strict=True):
    answer(aw, value, value)
  until(lambda: lab.batches)
  ((layer, rows, start_s, end_s, ranks),) = lab.batches
  assert (layer, rows, sorted(ranks)) == (6, 8, [0, 1, 2, 3])
  assert start_s <= end_s


def test_by_default_a_parcel_waits_for_nobody(lab):
  lab.desk()
  lab.aw(1)
  serves(lab.aw(0))


def test_a_replay_goes_ahead_of_what_came_before(lab):
  lab.desk()
  aws = [lab.aw(rank) for rank in range(3)]
  lab.experts.go.clear()
  aws[0].send(EW, 0, parcel(0, layer=1))
  assert lab.experts.began.wait(WAIT_S)
  aws[1].send(EW, 1, parcel(1, layer=2))
  aws[2].send_urgent(EW, 2, parcel(2, layer=3))
  lab.experts.go.set()
  for rank, aw in enumerate(aws):
    answer(aw, rank, rank)
  until(lambda: len(lab.batches) == 3)
  assert [batch[0] for batch in lab.batches] == [1, 3, 2]


def test_an_aw_that_is_killed_is_not_waited_for(lab):
  desk = lab.desk(TOGETHER)
  code = [sys.executable, "-c", AW, str(desk.address[1]), KEY.hex()]
  with subprocess.Popen(code, stdout=subprocess.PIPE, text=True) as dead:
    try:
      assert dead.stdout.readline() == "linked\n"
      alive = lab.aw(1)
      alive.send(EW, 7, parcel(7))
      until(lambda: desk._waiting)
      assert not lab.batches
      os.kill(dead.pid, signal.SIGKILL)
      answer(alive, 7, 7)
    finally:
      dead.kill()
  assert desk.live == {1}


def test_a_dead_aws_tokens_are_left_out(lab):
  desk = lab.desk(TOGETHER)
  dead, alive = lab.aw(0), lab.aw(1)
  dead.send(EW, 0, parcel(0))
  until(lambda: desk._waiting)
  dead.disconnect(EW)
  until(lambda: desk.live == {1})
  alive.send(EW, 1, parcel(1))
  answer(alive, 1, 1)
  until(lambda: lab.batches)
  assert [batch[4] for batch in lab.batches] == [[1]]


def test_a_fenced_aw_is_refused_until_it_is_another(lab):
  desk = lab.desk(TOGETHER)
  fenced, other = lab.aw(0), lab.aw(1)
  fenced.send(EW, 0, parcel(0))
  until(lambda: desk._waiting)
  desk.fence(0, 1)
  assert (desk.refused, desk.live) == (1, {1})
  assert fenced.receive(WAIT_S) == [Gone(EW, 1)]
  other.send(EW, 1, parcel(1))
  answer(other, 1, 1)
  with pytest.raises(ConnectionError, match="AW 0 is fenced up to 1"):
    fenced.connect(EW, desk.address, 1)
  assert desk.refused == 2
  again = lab.aw(0, incarnation=2)
  desk.fence(0, 1)  # late news
  assert desk.live == {0, 1}
  assert again.receive(0) == []


def test_a_fence_stops_the_answer_that_is_being_computed(lab):
  desk = lab.desk()
  fenced, other = lab.aw(0), lab.aw(1)
  lab.experts.go.clear()
  fenced.send(EW, 0, parcel(0))
  assert lab.experts.began.wait(WAIT_S)
  desk.fence(0, 1)
  # At once, though the desk's thread computes.
  assert fenced.receive(WAIT_S) == [Gone(EW, 1)]
  lab.experts.go.set()
  serves(other)


def test_an_aw_that_came_back_gets_no_answer_of_its_former_self(lab):
  desk = lab.desk()
  lab.experts.go.clear()
  lab.aw(0).send(EW, 0, parcel(1))
  assert lab.experts.began.wait(WAIT_S)
  again = lab.aw(0, incarnation=2)
  again.send(EW, 0, parcel(2))
  lab.experts.go.set()
  answer(again, 0, 2)
  serves(again)
  with pytest.raises(ConnectionError, match="AW 0 is fenced"):
    lab.aw(0, incarnation=1)
  assert desk.live == {0}


def test_what_a_former_self_had_waiting_is_dropped(lab):
  desk = lab.desk(TOGETHER)
  former, other = lab.aw(0), lab.aw(1)
  former.send(EW, 0, parcel(1))
  until(lambda: desk._waiting)
  again = lab.aw(0, incarnation=2)
  again.send(EW, 0, parcel(2))
  other.send(EW, 0, parcel(3))
  answer(again, 0, 2)
  answer(other, 0, 3)
  until(lambda: lab.batches)
  assert [batch[1] for batch in lab.batches] == [4]


def test_a_cut_link_is_silent_and_moves_on_when_restored(lab):
  desk = lab.desk()
  cut, other = lab.aw(0), lab.aw(1)
  serves(cut, 1)
  desk.cut(0)
  cut.send(EW, 5, parcel(5, layer=9))
  serves(other)
  assert cut.receive(0) == []
  assert 9 not in {batch[0] for batch in lab.batches}
  # Nor does the desk wake for it, again and again.
  assert len(desk._selector.get_map()) == len({"wake", "other"})
  desk.restore(0)
  answer(cut, 5, 5)


def test_a_cut_holds_back_the_answer_that_is_being_computed(lab):
  desk = lab.desk()
  cut, other = lab.aw(0), lab.aw(1)
  lab.experts.go.clear()
  cut.send(EW, 5, parcel(5))
  assert lab.experts.began.wait(WAIT_S)
  desk.cut(0)
  lab.experts.go.set()
  serves(other)
  assert cut.receive(0) == []
  assert desk.live == {0, 1}
  desk.restore(0)
  answer(cut, 5, 5)


def test_the_end_of_a_cut_link_is_told_when_it_is_restored(lab):
  desk = lab.desk()
  cut, other = lab.aw(0), lab.aw(1)
  desk.cut(0)
  cut.disconnect(EW)
  serves(other)
  assert desk.live == {0, 1}
  desk.restore(0)
  until(lambda: desk.live == {1})


def test_a_delay_holds_answers_of_that_aw_only(lab):
  desk = lab.desk()
  slow, other = lab.aw(0), lab.aw(1)
  desk.delay(0, 1e6)
  slow.send(EW, 1, parcel(1))
  until(lambda: lab.batches)
  serves(other)
  assert slow.receive(0) == []
  desk.delay(0, 1e-3)
  slow.send(EW, 2, parcel(2))
  answer(slow, 2, 2)
  desk.restore(0)
  serves(slow)


def test_an_error_of_the_computation_is_told_to_whose_parcel_it_is(lab):
  lab.desk(TOGETHER)
  bad, good = lab.aw(0), lab.aw(1)
  bad.send(EW, 4, parcel(-1))
  good.send(EW, 5, parcel(5))
  with pytest.raises(ComputeFailed, match="EW 3.*ArithmeticError: a negative"):
    bad.receive(WAIT_S)
  answer(good, 5, 5)
  # Another width can't be in one computation; both are served all the same.
  index = np.zeros(1, np.int32)
  bad.send(EW, 6, Parcel(0, np.ones((1, 7), np.float32), index, index))
  good.send(EW, 7, parcel(7))
  assert [r.y.shape for r in bad.receive(WAIT_S)] == [(1, 7)]
  answer(good, 7, 7)


def test_another_key_is_refused(lab):
  desk = lab.desk()
  with pytest.raises(ConnectionError, match="EW 3"):
    lab.aw(0, key=b"another key")
  until(lambda: desk.complaints)
  assert "AuthenticationError" in desk.complaints[0]
  assert desk.live == set()
  serves(lab.aw(1))


@pytest.mark.parametrize("data", [b"", b"\xff" * 64], ids=["silent", "loud"])
def test_strangers_hold_up_nobody(lab, data):
  desk = lab.desk()
  with socket.create_connection(desk.address) as stranger:
    stranger.sendall(data)
    serves(lab.aw(1))
    until(lambda: desk.complaints or not data)


def header(kind: int, code: int, n: int, m: int, width: int) -> bytes:
  return frames._HEADER.pack(b"rmoe", kind, code, 0, 0, 0, n, m, width)


@pytest.mark.parametrize(
  ("data", "complaint"),
  [
    (b"GET / HTTP/1.1\r\n" * 2, "no frame begins with b'GET / HT'"),
    (header(0, 9, 1, 1, 1), "no frame begins with"),
    (header(0, 1, 1 << 31, 1, 1 << 31), "is beyond the limit"),
    (header(1, 1, 0, 0, 0), "an AW can't send a frame of kind 1"),
    (header(0, 1, 1, 1, 1) + struct.pack("<fii", 1, 1, 0), "none of its 1"),
    (header(0, 1, 1, 1, 1) + struct.pack("<fii", 1, -1, 0), "none of its 1"),
  ],
  ids=["http", "dtype", "size", "kind", "token", "negative"],
)
def test_an_aw_that_talks_nonsense_is_cut_off_and_named(lab, data, complaint):
  desk = lab.desk()
  link = dial(desk.address, WAIT_S)
  link.greet(KEY, asks_first=False)
  link.send(["aw", 0, 1])
  assert link.receive() == ["welcome"]
  link._socket.sendall(data)
  until(lambda: desk.complaints)
  assert desk.complaints[0].startswith("AW 0: ")
  assert complaint in desk.complaints[0]
  assert desk.live == set()
  serves(lab.aw(1))
  link.close()


def test_a_link_begins_with_who_it_is(lab):
  desk = lab.desk()
  link = dial(desk.address, WAIT_S)
  link.greet(KEY, asks_first=False)
  link.send(["pull", "records"])
  with pytest.raises((EOFError, OSError)):
    link.receive()
  until(lambda: desk.complaints)
  assert "a link can't begin with ['pull'" in desk.complaints[0]
  link.close()


def test_nothing_is_left_after_the_end(monkeypatch):
  monkeypatch.setattr(reception, "HANDSHAKE_S", 1e6)
  threads = set(threading.enumerate())
  files = set(os.listdir("/proc/self/fd"))
  lab = Lab()
  desk = lab.desk()
  for rank in range(3):
    serves(lab.aw(rank), 1)
  desk.cut(2)
  desk.delay(1, 1e6)
  lab.aw(4).send(EW, 1, parcel(1))
  with socket.create_connection(desk.address):  # says nothing
    until(lambda: desk._reception._greeting)
    closes = threading.Thread(target=lab.close, daemon=True)
    closes.start()
    closes.join(WAIT_S)
    assert not closes.is_alive()
  desk.close()
  desk.fence(0, 1)
  assert set(threading.enumerate()) == threads
  assert set(os.listdir("/proc/self/fd")) == files
