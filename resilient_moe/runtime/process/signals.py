"""Faults, done to real processes: SIGKILL, SIGSTOP, and time taken away."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable

from resilient_moe.faults import Fault

PERIOD_S = 0.02  # a straggler is stopped and continued this often


class Signals:
  """Strikes at seeded moments inside of what goes on."""

  def __init__(
    self,
    seed: int,
    pid_of: Callable[[int], int | None],
    store_pid: Callable[[], int | None],
    struck: Callable[[Fault], None],
    elsewhere: Callable[[int, signal.Signals], None] | None = None,
  ) -> None:
    """`struck` is told right before a fault happens.

    `elsewhere` reaches ranks that have no process on this host.
    """
    self._random = random.Random(f"strike/{seed}")
    self._pid_of, self._store_pid = pid_of, store_pid
    self._struck = struck
    self._elsewhere = elsewhere
    self._armed: list[tuple[float, Callable[[], object]]] = []
    self._slowed: list[_Slowed] = []

  def arm(self, fault: Fault, within_s: float) -> None:
    """Lets a fault happen at a random moment of the next seconds."""
    at = time.monotonic() + self._random.uniform(0.0, within_s)
    self._armed.append((at, lambda: self._strike(fault)))

  def draw(self, n: int) -> int:
    """A number below `n`."""
    return self._random.randrange(n)

  def kill(self, rank: int) -> None:
    """The end of a rank that a fault takes together with another."""
    pid = self._pid_of(rank)
    if pid is not None:
      _send([pid], signal.SIGKILL)

  def due(self) -> None:
    """Does what is due; called every few milliseconds."""
    if not self._armed:
      return
    now = time.monotonic()
    ripe = [do for at, do in self._armed if at <= now]
    self._armed = [(at, do) for at, do in self._armed if at > now]
    for do in ripe:
      do()

  def close(self) -> None:
    """Nobody stays slowed down."""
    for slowed in self._slowed:
      slowed.end()

  def _strike(self, fault: Fault) -> None:
    pids = [p for r in fault.ranks if (p := self._pid_of(r)) is not None]
    self._struck(fault)
    if fault.kind == "rank_lost":
      self._hit(fault, pids, signal.SIGKILL)
    elif fault.kind == "rank_stuck":
      self._hit(fault, pids, signal.SIGSTOP)
      if fault.resume_s is not None:
        again = time.monotonic() + fault.resume_s
        self._armed.append((again, lambda: _send(pids, signal.SIGCONT)))
    elif fault.kind == "straggler":
      slowdown = float(fault.slowdown or 1.0)
      self._slowed.extend(_Slowed(pid, slowdown) for pid in pids)
    elif fault.kind == "store_lost":
      store = self._store_pid()
      _send([store] if store is not None else [], signal.SIGKILL)
    elif fault.kind == "supervisor_lost":
      os.kill(os.getpid(), signal.SIGKILL)

  def _hit(
    self, fault: Fault, pids: list[int], number: signal.Signals
  ) -> None:
    _send(pids, number)
    for rank in fault.ranks:
      if self._elsewhere is not None and self._pid_of(rank) is None:
        self._elsewhere(rank, number)


class _Slowed:
  """A process that gets only 1/slowdown of each period."""

  def __init__(self, pid: int, slowdown: float) -> None:
    self._pid, self._run_s = pid, PERIOD_S / slowdown
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._slow, daemon=True)
    self._thread.start()

  def _slow(self) -> None:
    while not self._ended.wait(self._run_s):
      if not _send([self._pid], signal.SIGSTOP):
        return
      time.sleep(PERIOD_S - self._run_s)
      _send([self._pid], signal.SIGCONT)

  def end(self) -> None:
    self._ended.set()
    self._thread.join()


def _send(pids: list[int], number: signal.Signals) -> bool:
  """Signals all that still exist; whether there was one."""
  sent = False
  for pid in pids:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, number)
      sent = True
  return sent
