"""Workers that count no more, until their processes are gone.

One that is fenced lives on for a grace, and what it says is refused; the end of
one that is killed takes a while, for which nobody waits.
"""

import time
from typing import Any

from resilient_moe.runtime.process.mate import Mate, ended, kill
from resilient_moe.runtime.process.wire import Reply
from resilient_moe.serving.carry import Record


class Departed:
  """Whom the crew has parted with."""

  def __init__(self, record: Record) -> None:
    self._record = record
    self._fenced: list[tuple[float, Mate]] = []  # killed at that time
    self._dying: list[Mate] = []  # killed, not reaped yet

  def kill(self, mate: Mate) -> None:
    """It is dead, or is to be."""
    kill(mate)
    self._dying.append(mate)

  def fence(self, mate: Mate, grace_s: float) -> None:
    """It is killed after a grace, if it isn't gone by then."""
    self._fenced.append((time.monotonic() + grace_s, mate))

  def lingers(self, rank: int) -> bool:
    """Whether a process of the rank is fenced and not killed yet."""
    return any(mate.rank == rank for _, mate in self._fenced)

  def speakers(self) -> dict[Any, Mate]:
    """By connection, who may still say something (see `refuse`)."""
    # Any: the stubs of `wait` know no keys of a dict.
    return {m.work: m for _, m in self._fenced if m.work is not None}

  def refuse(self, mate: Mate) -> None:
    """A fenced worker speaks (it was continued): recorded, not listened to."""
    assert mate.work is not None
    try:
      reply: Reply = mate.work.recv()
      self._record("stale", epoch=reply.epoch, rank=mate.rank)
    except (EOFError, OSError):
      mate.work = None

  def reap(self) -> None:
    """Kills those whose grace is over; forgets who is gone."""
    now = time.monotonic()
    for at, mate in self._fenced:
      if now >= at:
        self.kill(mate)
    self._fenced = [(at, m) for at, m in self._fenced if now < at]
    self._dying = [m for m in self._dying if not ended(m)]

  def close(self) -> None:
    """Ends them all, and waits for it."""
    for _, mate in self._fenced:
      self.kill(mate)
    for mate in self._dying:
      if mate.process is not None:
        mate.process.wait()
