"""Whole runs on real processes, and what of them can be seen in /proc.

Everything that a test starts inherits a mark in its environment, by which it
is found again: whatever became of its parents, session or command line.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from resilient_moe.mesh.executables import Executables
from resilient_moe.report import read_history
from resilient_moe.report.history import of_kind
from resilient_moe.runtime import assemble, gateway
from resilient_moe.runtime.case import Case
from tests.runtime.harness import Lab, make_case

MARK = "RMOE_TEST_MARK"
LIMIT_S = 200.0  # ends a run that hangs; none takes nearly as long
GONE_S = 10.0  # for processes to be gone; they take milliseconds
WORKER = "resilient_moe.runtime.process.worker"
ENGINE = "resilient_moe.runtime.engine"
LISTENS = "0A"  # a socket's state in /proc/net/tcp

Event = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Marked:
  """The processes of one test."""

  mark: str

  def pids(self, *words: str) -> list[int]:
    """Those that live and have all these words in their command line."""
    wanted = f"{MARK}={self.mark}".encode()
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):  # it ended, or is another user's
        if wanted not in (entry / "environ").read_bytes().split(b"\0"):
          continue
        line = (entry / "cmdline").read_bytes().decode().split("\0")
        if set(words) <= set(line):
          found.append(int(entry.name))
    return found

  def wait(self, *words: str, limit_s: float = 60.0) -> int:
    """The one process with these words, once there is one."""
    give_up = time.monotonic() + limit_s
    while not (found := self.pids(*words)):
      assert time.monotonic() < give_up, f"no process {words} came up"
      time.sleep(0.01)
    (pid,) = found
    return pid

  def left(self) -> list[str]:
    """Command lines of who doesn't go away by itself; [] if all do."""
    give_up = time.monotonic() + GONE_S
    while (pids := self.pids()) and time.monotonic() < give_up:
      time.sleep(0.05)
    return [f"{pid} {command_line(pid)}" for pid in pids]

  def kill(self, *words: str) -> None:
    for pid in self.pids(*words):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def marking() -> Iterator[Marked]:
  """Marks what is started under it, and ends all that is left of it."""
  mark = Marked(uuid.uuid4().hex)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(MARK, mark.mark)
    try:
      yield mark
    finally:
      mark.kill()


def command_line(pid: int) -> str:
  with contextlib.suppress(OSError):
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(
      b"\0", b" ").decode()  # fmt: skip
  return "gone"


def listening(pids: list[int]) -> set[str]:
  """Addresses at which these processes listen, in the kernel's notation."""
  inodes = set()
  for pid in pids:
    for end in pathlib.Path(f"/proc/{pid}/fd").glob("*"):
      with contextlib.suppress(OSError):
        inodes.add(os.readlink(end))
  found = set()
  for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in pathlib.Path(table).read_text().splitlines()[1:]:
      fields = line.split()
      if fields[3] == LISTENS and f"socket:[{fields[9]}]" in inodes:
        found.add(fields[1])
  return found


@contextlib.contextmanager
def at_most(limit_s: float, marked: Marked) -> Iterator[None]:
  """Kills what a test has started when it takes too long."""
  timer = threading.Timer(limit_s, marked.kill)
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def process_case(lab: Lab, policy: str, *faults: Any, **fields: Any) -> Case:
  return make_case(lab, policy, faults, runtime="process", **fields)


def seed_store(lab: Lab, case: Case, folder: pathlib.Path) -> None:
  """Puts every program of a case where its engine looks for them."""
  plans = assemble.plan_instance(case, assemble.Fresh())
  source = lab.store(plans) / "executables"
  if not plans.view.disaggregated:
    executables = Executables(plans.shape, source)
    several = sum(len(f.ranks) for f in case.faults) > 1
    for chunk in plans.shape.chunks() if several else ():
      executables.compile_for(chunk, jax.devices()[: case.ranks - 2])
    executables.rank_programs(jax.devices()[0])
  shutil.copytree(source, folder, dirs_exist_ok=True)


@dataclasses.dataclass
class Runs:
  """Cases of one test, run through the gateway as experiments do."""

  lab: Lab
  folder: pathlib.Path
  marked: Marked

  def __call__(
    self, case: Case, progress: Callable[[Event], None] | None = None,
    cold: bool = False,
  ) -> list[Event]:  # fmt: skip
    """A run's events; `cold`: its engine finds no compiled programs."""

    def on_event(event: Event) -> None:
      if event["event"] == "run" and not cold:
        seed_store(self.lab, case, self.folder / "scratch" / "executables")
      if progress is not None:
        progress(event)

    with at_most(LIMIT_S, self.marked):
      gateway.run_case(case, self.folder, on_event)
    return read_history(self.folder / "history.jsonl")


def kinds(events: list[Event], name: str, field: str) -> list[Any]:
  """One field of all events of a name."""
  return [e[field] for e in of_kind(events, name)]


def actions(events: list[Event], name: str) -> list[str]:
  """Outcomes of all actions of a name."""
  done = of_kind(events, "action")
  return [e["outcome"] for e in done if e["name"] == name]


def moved(events: list[Event]) -> dict[str, int]:
  """Tokens prefilled again by each kind of move."""
  total: dict[str, int] = {}
  for e in of_kind(events, "requests_moved"):
    total[e["kind"]] = total.get(e["kind"], 0) + e["tokens"]
  return total
