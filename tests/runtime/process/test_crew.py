"""The supervisor's crew over workers that only speak its language (no JAX).

Real processes over real sockets, answering probes from a thread; what a call
does to them is in its name.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from resilient_moe.runtime.process import mate as mate_lib
from resilient_moe.runtime.process.cluster import Cluster
from resilient_moe.runtime.process.crew import Crew
from resilient_moe.runtime.process.mate import RanksGone, WorkerFailed
from resilient_moe.runtime.process.rules import Limits
from resilient_moe.runtime.process.watch import Watch
from tests.runtime.process.harness import Marked

HOST = "127.0.0.1"
WAIT_S = 30.0
LIMITS = {"stuck_s": 0.4, "overdue_min_s": 0.4, "grace_s": 60.0}

STUB = """
import os, pathlib, sys, threading, time
from multiprocessing.connection import Client
from resilient_moe.runtime.process import wire
from resilient_moe.runtime.process.probe import Responder

rank, incarnation = (int(a.split("=")[1]) for a in sys.argv[1:3])
host, port = sys.argv[3].rsplit(":", 1)
key = bytes.fromhex(os.environ[wire.AUTHKEY])

def connect(kind):
  end = Client((host, int(port)), authkey=key)
  end.send(wire.Hello(rank, incarnation, kind))
  return end

work, control = connect("work"), connect("control")
gone, told = [], []

def listen():
  try:
    while True:
      gone.extend(getattr(control.recv(), 'gone', ()))
  except (EOFError, OSError):
    os._exit(3)

threading.Thread(target=listen, daemon=True).start()
setup = work.recv()
if setup == "exit":
  os._exit(7)
if setup == "refuse":
  work.send(wire.Reply(0, 0, None, "no room"))
  os._exit(1)
responder = Responder.start(host, pathlib.Path(setup))
up = wire.Up((host, 1), responder.port, responder.native, 1, 1, 1, {})
work.send(wire.Reply(0, 0, up))
while True:
  call = work.recv()
  value, error = call.args.get("value"), ""
  if call.op == "die":
    os._exit(9)
  elif call.op == "nap":
    time.sleep(value)
  elif call.op == "fail":
    error = "it can't"
  elif call.op == "gone":
    value = gone
  elif call.op == "note":
    told.append(value)
  elif call.op == "told":
    value = told
  elif call.op == "wait_gone":
    while not gone:
      time.sleep(0.001)
    error = "aborted"
  if not call.one_way:
    work.send(wire.Reply(call.number, call.epoch, value, error))
"""


class Team:
  """A crew, and the events that it recorded."""

  def __init__(self, folder: pathlib.Path, marked: Marked) -> None:
    self.folder, self.marked = folder, marked
    self.events: list[tuple[str, dict]] = []
    self.during: Callable[[], None] = lambda: None  # while a call waits
    watch = Watch(Limits(**LIMITS), folder)
    self.crew = Crew(Cluster(), self._record, watch, lambda: self.during())

  def _record(self, event: str, **fields: Any) -> None:
    self.events.append((event, fields))

  def start(self, *ranks: int, setup: Any = None) -> None:
    for rank in ranks:
      self.crew.start(rank, 0, setup or str(self.folder))

  def up(self, *ranks: int) -> None:
    self.start(*ranks)
    # A real worker starts for seconds; the stub may be up before its second
    # connection is greeted.
    until(lambda: all(self.crew.is_up(r) and self.crew.mate(r).control
                      for r in ranks))  # fmt: skip

  def call(self, op: str, *ranks: int, value: Any = None) -> Any:
    return self.crew.call({r: {"value": value} for r in ranks}, op)

  def pid(self, rank: int) -> int:
    return self.crew.mate(rank).process.pid

  def of(self, event: str) -> list[dict]:
    return [fields for name, fields in self.events if name == event]

  def close(self) -> None:
    self.crew.close()
    self.crew.watch.close()


@pytest.fixture
def team(
  tmp_path: pathlib.Path, marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Team]:
  stub = tmp_path / "stub.py"
  stub.write_text(STUB)

  def popen(command: list[str], **kwargs: Any) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(stub), *command[3:]], **kwargs)

  instead = types.SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)
  monkeypatch.setattr(mate_lib, "subprocess", instead)
  monkeypatch.setenv("PYTHONPATH", os.getcwd())
  made = Team(tmp_path, marked)
  yield made
  made.close()


def until(there: Callable[[], Any]) -> None:
  give_up = time.monotonic() + WAIT_S
  while not there():
    assert time.monotonic() < give_up
    time.sleep(0.005)


def test_everybody_answers_for_itself(team: Team) -> None:
  team.up(0, 1)
  said = team.crew.call({0: {"value": "a"}, 1: {"value": "b"}}, "echo")
  assert said.good() == {0: "a", 1: "b"}
  team.crew.tell({1: {"value": 7}}, "note")
  assert team.call("told", 0, 1).good() == {0: [], 1: [7]}
  team.crew.call({0: {}, 1: {}}, "echo").good()
  with pytest.raises(WorkerFailed, match="rank 0: it can't"):
    team.call("fail", 0).good()
  assert team.crew.take_lost() == ()
  # One that stumbles is not lost; one that dies is, once.
  answers = team.call("die", 1)
  assert answers.lost == (1,)
  assert team.crew.take_lost() == (1,)
  assert team.crew.take_lost() == ()
  until(lambda: team.call("gone", 0).good() == {0: [(1, 0)]})
  with pytest.raises(RanksGone, match=r"\[1\] are gone"):
    team.call("echo", 0, 1).good()
  assert team.call("told", 0).good() == {0: []}, "it was not even asked"


def test_a_death_frees_those_who_wait_for_the_dead(team: Team) -> None:
  team.up(0, 1)
  pid = team.pid(1)

  def kill() -> None:
    team.during = lambda: None
    os.kill(pid, signal.SIGKILL)

  team.during = kill
  answers = team.call("wait_gone", 0, 1)
  assert (answers.lost, answers.errors) == ((1,), {0: "aborted"})
  assert team.of("warning") == []


def test_the_stuck_are_fenced_and_their_return_refused(team: Team) -> None:
  """Then killed, when the grace is over; a short pause costs nobody."""
  team.up(0, 1)
  pid = team.pid(1)
  os.kill(pid, signal.SIGSTOP)
  waking = time.monotonic() + 0.1

  def wake() -> None:
    if time.monotonic() > waking:
      os.kill(pid, signal.SIGCONT)

  team.during = wake
  assert team.call("echo", 0, 1, value=3).good() == {0: 3, 1: 3}
  team.during = lambda: None
  # A worker that computes for long answers its probes: it may.
  assert team.call("nap", 0, 1, value=1.0).good() == {0: 1.0, 1: 1.0}

  os.kill(pid, signal.SIGSTOP)
  team.crew.epoch = 5
  answers = team.call("echo", 0, 1, value="late")
  assert answers.lost == (1,)
  assert answers.values == {0: "late"}
  assert team.crew.take_lost() == (1,)
  assert team.crew.lingers(1)
  assert team.of("warning") == [
    {"text": "rank 1 is alive and does not answer: fenced"}
  ]
  until(lambda: team.call("gone", 0).good() == {0: [(1, 0)]})
  assert team.of("stale") == []
  os.kill(pid, signal.SIGCONT)

  def heard() -> bool:
    team.crew.look()
    return bool(team.of("stale"))

  until(heard)
  assert team.of("stale") == [{"epoch": 5, "rank": 1}]
  assert team.crew.take_lost() == ()
  departed = team.crew._departed
  departed._fenced = [(0.0, mate) for _, mate in departed._fenced]
  team.crew.look()
  assert not team.crew.lingers(1)
  assert team.marked.pids("rank=1") == []


def test_who_cannot_start_is_told_of(team: Team) -> None:
  team.start(0, setup="exit")
  until(lambda: not team.crew.is_up(0) and not team.crew.alive(0))
  assert team.crew.take_lost() == (0,)
  team.start(1, setup="refuse")
  with pytest.raises(WorkerFailed, match="no room"):
    until(lambda: team.crew.is_up(1))


def test_a_greeting_of_an_older_process_is_not_for_its_successor(
  team: Team,
) -> None:
  team.start(0)
  old = team.crew.mate(0)
  until(lambda: len(team.crew._door._arrived) == 2)
  team.crew.start(0, 1, str(team.folder))
  until(lambda: team.crew.is_up(0))
  assert team.crew.mate(0).incarnation == 1
  assert team.call("echo", 0, value=1).good() == {0: 1}
  assert old.process.wait(WAIT_S) != 0, "nobody talks to it"


def test_a_stranger_at_the_door_keeps_nobody_out(team: Team) -> None:
  with socket.create_connection(team.crew._door.address):
    team.start(0)
    give_up = time.monotonic() + 5
    while not team.crew.is_up(0) and time.monotonic() < give_up:
      time.sleep(0.01)
    assert team.crew.is_up(0)


def test_the_end_leaves_nobody(team: Team) -> None:
  team.up(0, 1)
  team.start(2)  # not up yet
  os.kill(team.pid(0), signal.SIGSTOP)
  os.kill(team.pid(1), signal.SIGSTOP)
  team.crew.fence(1)
  team.close()
  assert team.marked.pids() == []
