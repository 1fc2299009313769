"""When a rank is suspected, stuck or slow: decisions without clock or sockets.

Evidence and times are arguments, so the same evidence always gives the same
decision. What is done about it (fence, kill after `grace_s`, report) is the
supervisor's.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping

STEPS_KEPT = 64  # durations behind the median step time
MIN_INTERVAL_S = 0.001
RUNNING = 2  # slow windows in a row that make a straggler


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much evidence a decision needs.

  Attributes:
    probe_interval_s: between two probes of a rank.
    misses: unanswered probes in a row that make a rank suspected.
    stuck_s: silence that, while a step is overdue, means stuck.
    overdue_factor: a step is overdue after this many median step times ...
    overdue_min_s: ... but never sooner than this.
    grace_s: between fencing a stuck rank and killing it.
    straggler_ratio: times the median rank's work that make a rank slow.
    straggler_window: steps over which work is averaged.
  """

  probe_interval_s: float = 0.01
  misses: int = 3
  stuck_s: float = 0.5
  overdue_factor: float = 20.0
  overdue_min_s: float = 0.5
  grace_s: float = 1.0
  straggler_ratio: float = 3.0
  straggler_window: int = 64

  def __post_init__(self) -> None:
    for name, low in (
      ("probe_interval_s", MIN_INTERVAL_S),
      ("misses", 1),
      ("overdue_factor", 1.0),
      ("overdue_min_s", 0.0),
      ("grace_s", 0.0),
      ("straggler_window", 1),
      # A rank that answers every probe can be silent this long.
      ("stuck_s", self.misses * self.probe_interval_s),
    ):
      value = getattr(self, name)
      if not low <= value < math.inf:
        raise ValueError(
          f"{name} is {value}; needed is a finite number of at least {low:g}"
        )
    for name in ("misses", "straggler_window"):
      if getattr(self, name) % 1:
        raise ValueError(
          f"{name} is {getattr(self, name)}; needed is an integer"
        )
    if not 1.0 < self.straggler_ratio < math.inf:
      raise ValueError(
        f"straggler_ratio is {self.straggler_ratio}; needed is a finite "
        "number above 1"
      )


def suspected(missed: Mapping[int, int], limits: Limits) -> tuple[int, ...]:
  """Ranks that missed too many probes. A suspicion alone never kills."""
  return tuple(r for r in sorted(missed) if missed[r] >= limits.misses)


class StepClock:
  """Knows how long steps take, hence when one is overdue."""

  def __init__(self, limits: Limits) -> None:
    self._limits = limits
    self._seconds: collections.deque[float] = collections.deque(
      maxlen=STEPS_KEPT
    )

  def finished(self, seconds: float) -> None:
    self._seconds.append(seconds)

  def overdue(self, running_s: float) -> bool:
    """Whether a step that runs for so long should have finished."""
    median = statistics.median(self._seconds) if self._seconds else 0.0
    limits = self._limits
    allowed = max(limits.overdue_min_s, limits.overdue_factor * median)
    return running_s >= allowed


def stuck(
  silence_s: Mapping[int, float],
  running_s: float,
  clock: StepClock,
  limits: Limits,
) -> tuple[int, ...]:
  """Ranks that hold up a step: long silent while it is overdue.

  Args:
    silence_s: of each rank, seconds since it last answered a probe.
    running_s: how long the step at hand has run.
    clock: what it has learned from the steps before.
    limits: how long is too long.

  Returns:
    The ranks, in order.
  """
  if not clock.overdue(running_s):
    return ()
  return tuple(r for r in sorted(silence_s) if silence_s[r] >= limits.stuck_s)


class Stragglers:
  """Finds ranks whose own work takes several times their peers'.

  Steps are taken in windows that don't overlap, and a rank must be slow in two
  of them in a row: one long pause is not a slow rank. Only ranks that were in
  all steps of a window are compared. The median is the lower of two, so that
  of two ranks the slower one is told from the faster.
  """

  def __init__(self, limits: Limits) -> None:
    self._limits = limits
    self._steps = 0  # in the window at hand
    self._window: dict[int, list[float]] = {}
    self._slow: dict[int, int] = {}  # windows in a row
    self._slowdown: dict[int, float] = {}  # in the last full window
    self._reported: set[int] = set()

  def add(self, local_s: Mapping[int, float]) -> None:
    """Seconds of work of each rank in one step, collectives left out."""
    self._steps += 1
    for rank, seconds in local_s.items():
      self._window.setdefault(rank, []).append(seconds)
    if self._steps == self._limits.straggler_window:
      self._close_window()

  def reports(self) -> tuple[tuple[int, float], ...]:
    """`(rank, slowdown)` of ranks found slow and not reported before."""
    new = [
      rank
      for rank in sorted(self._slow)
      if self._slow[rank] >= RUNNING and rank not in self._reported
    ]
    self._reported.update(new)
    return tuple((rank, self._slowdown[rank]) for rank in new)

  def forget(self, rank: int) -> None:
    """All that is known of a rank: it was replaced, or may be told again."""
    self._reported.discard(rank)
    for known in (self._window, self._slow, self._slowdown):
      known.pop(rank, None)

  def _close_window(self) -> None:
    means = {
      rank: statistics.fmean(seconds)
      for rank, seconds in self._window.items()
      if len(seconds) == self._steps
    }
    self._slowdown = _slowdowns(means)
    self._slow = {
      rank: self._slow.get(rank, 0) + 1
      for rank, slowdown in self._slowdown.items()
      if slowdown >= self._limits.straggler_ratio
    }
    self._steps, self._window = 0, {}


def _slowdowns(means: Mapping[int, float]) -> dict[int, float]:
  """Each rank's work as a multiple of the median rank's; {} if none has any."""
  median = statistics.median_low(means.values()) if means else 0.0
  return {r: mean / median for r, mean in means.items()} if median > 0 else {}
