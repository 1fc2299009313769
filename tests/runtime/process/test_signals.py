"""Faults done to dummy processes: what the kernel says of them afterwards."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from resilient_moe.faults import Fault
from resilient_moe.runtime.process import signals
from resilient_moe.runtime.process.signals import Signals

WAIT_S = 20.0
STOPPED = "T"  # a state in /proc
TICK_HZ = os.sysconf("SC_CLK_TCK")

Spawn = Callable[[str], subprocess.Popen]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
  """Starts Python code in a process; all are killed at the end."""
  started: list[subprocess.Popen] = []

  def start(code: str = "import time; time.sleep(600)") -> subprocess.Popen:
    started.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.wait()


class Struck:
  """Signals over some processes, and what they said they would do."""

  def __init__(
    self, *processes: subprocess.Popen, store: int | None = None,
    seed: int = 0,
  ) -> None:  # fmt: skip
    self.said: list[Fault] = []
    pids = {rank: p.pid for rank, p in enumerate(processes)}
    self.signals = Signals(seed, pids.get, lambda: store, self.said.append)

  def strike(self, kind: str, *ranks: int, **fields: float) -> None:
    """Lets a fault happen now."""
    self.signals.arm(Fault(kind, ranks, at_step=0, **fields), 0.0)
    self.signals.due()


def fields(pid: int) -> list[str]:
  """Of /proc/PID/stat, from the state on."""
  line = pathlib.Path(f"/proc/{pid}/stat").read_text()
  return line.rpartition(")")[2].split()


def state(pid: int) -> str:
  return fields(pid)[0]


def cpu_s(pid: int) -> float:
  return sum(map(int, fields(pid)[11:13])) / TICK_HZ


def until(there: Callable[[], bool], while_: Callable[[], None]) -> None:
  give_up = time.monotonic() + WAIT_S
  while not there():
    assert time.monotonic() < give_up
    while_()
    time.sleep(0.002)


def test_the_lost_are_killed_and_nobody_else(spawn: Spawn) -> None:
  processes = [spawn() for _ in range(3)]
  struck = Struck(*processes)
  struck.strike("rank_lost", 0, 2)
  assert processes[0].wait(WAIT_S) == -signal.SIGKILL
  assert processes[2].wait(WAIT_S) == -signal.SIGKILL
  assert processes[1].poll() is None
  assert [f.ranks for f in struck.said] == [(0, 2)]


def test_the_history_hears_of_it_first(spawn: Spawn) -> None:
  process = spawn()
  alive: list[bool] = []
  found = Signals(
    0, lambda rank: process.pid, lambda: None,
    lambda fault: alive.append(process.poll() is None),
  )  # fmt: skip
  found.arm(Fault("rank_lost", (0,), at_step=0), 0.0)
  found.due()
  process.wait(WAIT_S)
  assert alive == [True]


def test_who_is_gone_already_is_no_trouble(spawn: Spawn) -> None:
  process = spawn()
  process.kill()
  process.wait()
  struck = Struck(process)
  for kind in ("rank_lost", "rank_stuck"):
    struck.strike(kind, 0)
    struck.strike(kind, 5)
  struck.strike("store_lost")
  assert len(struck.said) == 5


def test_the_store_is_killed(spawn: Spawn) -> None:
  store = spawn()
  Struck(store=store.pid).strike("store_lost")
  assert store.wait(WAIT_S) == -signal.SIGKILL


def test_the_stuck_stay_stopped(spawn: Spawn) -> None:
  process = spawn()
  struck = Struck(process)
  struck.strike("rank_stuck", 0)
  until(lambda: state(process.pid) == STOPPED, struck.signals.due)
  for _ in range(20):
    struck.signals.due()
    time.sleep(0.005)
  assert state(process.pid) == STOPPED


def test_the_stuck_go_on_after_their_time_and_not_before(
  spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
  now = time.monotonic()
  monkeypatch.setattr(signals.time, "monotonic", lambda: now)
  process = spawn()
  struck = Struck(process)
  struck.strike("rank_stuck", 0, resume_s=5.0)
  until_s(process, STOPPED)
  now += 4.9
  struck.signals.due()
  time.sleep(0.05)
  assert state(process.pid) == STOPPED
  now += 0.2
  struck.signals.due()
  until_s(process, "S")


def until_s(process: subprocess.Popen, wanted: str) -> None:
  """Waits by sleeps alone, whatever the clock is said to be."""
  for _ in range(4000):
    if state(process.pid) == wanted:
      return
    time.sleep(0.005)
  pytest.fail(f"{state(process.pid)}, not {wanted}")


def test_a_straggler_gets_its_share_and_runs_free_after_the_end(
  spawn: Spawn,
) -> None:
  """Beside a twin that is left alone, both pinned to the same core."""
  code = "while True: pass"
  slow, free = spawn(code), spawn(code)
  core = {min(os.sched_getaffinity(0))}
  for process in (slow, free):
    os.sched_setaffinity(process.pid, core)
  struck = Struck(slow, free)
  struck.strike("straggler", 0, slowdown=8.0)
  try:
    until(lambda: cpu_s(free.pid) > 0.7, lambda: None)
    # Half of the core by right, or an eighth of the time: 1/7 of the twin's.
    share = cpu_s(slow.pid) / cpu_s(free.pid)
    assert 0.02 < share < 0.5
  finally:
    struck.signals.close()
  before = cpu_s(slow.pid)
  until(lambda: cpu_s(slow.pid) > before + 0.1, lambda: None)
  assert state(slow.pid) != STOPPED


def test_a_straggler_that_dies_ends_its_slowing(spawn: Spawn) -> None:
  process = spawn()
  struck = Struck(process)
  others = threading.active_count()
  struck.strike("straggler", 0, slowdown=2.0)
  assert threading.active_count() == others + 1
  process.kill()
  process.wait()
  until(lambda: threading.active_count() == others, lambda: None)
  struck.signals.close()


def moments(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
  """When faults that are armed together strike, and which."""
  now = [100.0]
  monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
  said: list[tuple] = []
  found = Signals(
    seed, lambda rank: None, lambda: None,
    lambda fault: said.append((round(now[0], 3), fault.ranks)),
  )  # fmt: skip
  for rank in range(6):
    found.arm(Fault("rank_lost", (rank,), at_step=0), 0.5)
  while now[0] < 101.0:
    found.due()
    now[0] += 0.001
  return said


def test_faults_strike_at_their_own_moments(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  said = moments(1, monkeypatch)
  assert {ranks for _, ranks in said} == {(r,) for r in range(6)}
  times = [t for t, _ in said]
  assert times == sorted(times)
  assert 100.0 <= times[0] < times[-1] <= 100.501
  assert len(set(times)) > 3, "not all at once"
  assert moments(1, monkeypatch) == said
  assert moments(2, monkeypatch) != said
