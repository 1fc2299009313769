"""Virtual time, and what is on its way in it."""

import heapq
from collections.abc import Callable

FOREVER = 100_000  # sleeps in a row with nothing on its way


class VirtualClock:
  """A `serving.clock.Clock` that stands still unless it is told to go on.

  What happens later is a call at its time; calls of one time keep the order
  in which they were made, so equal runs have equal histories.
  """

  def __init__(self) -> None:
    self._now_s = 0.0
    self._queue: list[tuple[float, int, Callable[[], None]]] = []
    self._made = 0  # calls ever, for the order
    self._slept = 0

  def now(self) -> float:
    return self._now_s

  def at(self, when_s: float, call: Callable[[], None]) -> None:
    """Calls at that moment, or as soon as it can if that has passed."""
    self._made += 1
    heapq.heappush(
      self._queue, (max(when_s, self._now_s), self._made, call)
    )

  def next_s(self) -> float | None:
    """When the next thing happens; None: nothing is on its way."""
    return self._queue[0][0] if self._queue else None

  def catch_up(self) -> None:
    """Lets happen what is due now."""
    while self._queue and self._queue[0][0] <= self._now_s:
      heapq.heappop(self._queue)[2]()

  def step(self) -> bool:
    """Goes on to the next moment at which something happens, if any."""
    if not self._queue:
      return False
    self._now_s = max(self._now_s, self._queue[0][0])
    self.catch_up()
    return True

  def spend(self, seconds: float) -> None:
    """Lets exactly so much time pass, with all that happens in it."""
    until_s = self._now_s + seconds
    while self._queue and self._queue[0][0] <= until_s:
      self.step()
    self._now_s = max(self._now_s, until_s)

  def sleep(self, seconds: float) -> None:
    """Goes on to what happens next; if nothing will, for so long.

    Raises:
      RuntimeError: whoever sleeps waits for something that never comes.
    """
    if self.step():
      self._slept = 0
      return
    self._slept += 1
    if self._slept > FOREVER:
      raise RuntimeError(
        f"nothing is on its way at {self._now_s:.3f} s of virtual time, and "
        f"somebody has slept {FOREVER} times"
      )
    self._now_s += seconds
