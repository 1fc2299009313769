"""What time it is: the machine's, or a simulation's own (DESIGN 2.4)."""

import time
from typing import Protocol


class Clock(Protocol):
  """Seconds that never go back, from an arbitrary start."""

  def now(self) -> float:
    """The present moment."""

  def sleep(self, seconds: float) -> None:
    """Lets time pass until there may be something to do.

    Real time: that long. Virtual time: until something happens that is on its
    way already, else that long.
    """


class RealClock:
  """The machine's monotonic clock."""

  def now(self) -> float:
    return time.monotonic()

  def sleep(self, seconds: float) -> None:
    time.sleep(seconds)


REAL_CLOCK = RealClock()
