"""Requests that wait for a group, as a fluid: exact between two events.

Requests arrive at a rate that is constant within a minute and start, in order,
at most at the group's capacity, constant between events. Who finds the queue
full is refused; after an outage that lasted longer than clients wait, only the
last of them are still there.

While groups are healthy their queues are alike, so that much is computed once
(`Healthy`): a group is followed by itself only from an event until its queue
is again the healthy one.
"""

import collections
import dataclasses

import numpy as np

from resilient_moe.sim.arrivals import MINUTE_S

# Waits are counted in bins, from a millisecond to a day.
EDGES_S = np.geomspace(1e-3, 1e5, 161)
_NOBODY = 1e-9  # requests


@dataclasses.dataclass(frozen=True)
class Demand:
  """What comes to each group, and what it may expect."""

  rate_per_s: np.ndarray  # [M] requests a second in each minute, repeated
  wait_slo_s: float  # a request is in time if it waits at most this long
  patience_s: float  # then its client goes
  queue_limit: float  # requests

  def at(self, minute: int) -> float:
    """Requests a second in a minute of the run."""
    return float(self.rate_per_s[minute % len(self.rate_per_s)])


@dataclasses.dataclass
class Counts:
  """Requests by what became of them; `refused` have left, too."""

  arrived: float = 0.0
  refused: float = 0.0
  started: float = 0.0
  in_time: float = 0.0  # of those, within the objectives
  at_once: float = 0.0  # of those, without a wait
  # Of the others, who waited at most each of `EDGES_S`.
  waits: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(len(EDGES_S))
  )

  def add(self, other: "Counts", times: float = 1.0) -> None:
    """Adds `times` as many as `other` has."""
    for field in dataclasses.fields(self):
      mine, theirs = getattr(self, field.name), getattr(other, field.name)
      setattr(self, field.name, mine + times * theirs)

  def within(self, seconds: np.ndarray) -> np.ndarray:
    """Part of the started requests that waited at most `seconds` [.], [.]."""
    times, waits = np.append(0.0, EDGES_S), np.append(0.0, self.waits)
    below = self.at_once + np.interp(seconds, times, waits)
    return np.where(seconds >= 0, below / max(self.started, _NOBODY), 0.0)

  def wait_s(self, quantile: float, own_s: np.ndarray | None = None) -> float:
    """What this part of the started requests waited at most.

    `own_s` [n]: what requests take besides, each as likely, whatever they
    waited; of wait and that together.
    """
    own, times = np.unique(
      np.zeros(1) if own_s is None else own_s, return_counts=True
    )
    share = times / times.sum()
    low, high = 0.0, float(EDGES_S[-1] + own[-1])
    if not self.started or self.within(low - own) @ share >= quantile:
      return 0.0
    while high - low > 1e-4 * low + 1e-6:
      middle = (low + high) / 2
      enough = self.within(middle - own) @ share >= quantile
      low, high = (low, middle) if enough else (middle, high)
    return high


def count_waits(
  parts: np.ndarray, slo_s: float
) -> tuple[np.ndarray, float]:
  """Requests that waited at most each of `EDGES_S`, and at most `slo_s`.

  `parts` [n, 3]: so many requests, whose waits go evenly from one number of
  seconds to another.
  """
  requests, first, last = parts.T
  low, high = np.minimum(first, last), np.maximum(first, last)
  at = np.append(EDGES_S, slo_s)[None, :] + 1e-9
  span = np.maximum(high - low, 1e-12)[:, None]
  below = np.clip((at - low[:, None]) / span, 0, 1)
  total = requests @ below
  return total[:-1], float(total[-1])


class Queue:
  """The queue of one group."""

  def __init__(
    self, demand: Demand, capacity: float, healthy: "Healthy | None" = None
  ) -> None:
    self.demand = demand
    self.t_s = 0.0
    self.counts = Counts()
    self.waiting = 0.0  # requests
    self._healthy = healthy
    self._capacity = capacity
    self._good = True
    self._dry_since = 0.0 if capacity <= 0 else None
    # Who waits, in order: (from when, until when they came, how many).
    self._queue: collections.deque[tuple[float, float, float]] = (
      collections.deque()
    )
    self._parts: list[tuple[float, float, float]] = []  # for `count_waits`

  @property
  def capacity(self) -> float:
    """Requests a second that can start now."""
    return self._capacity

  def set(self, capacity: float, good: bool = True) -> None:
    """From now on: requests a second that can start; if in good time.

    Not `good` are those whose tokens come too slowly for the objective.
    """
    if good != self._good:
      self._settle()
      self._good = good
    if capacity > 0 and self._dry_since is not None:
      self._after_outage(self._dry_since)
      self._dry_since = None
    elif capacity <= 0 and self._dry_since is None:
      self._dry_since = self.t_s
    self._capacity = max(capacity, 0.0)

  def take_back(self, requests: float) -> None:
    """Requests that had started wait again, behind the others."""
    self.counts.started -= requests
    self.counts.at_once -= requests
    self.counts.in_time -= requests
    self._put(requests)

  def fail(self, requests: float, retried: bool = True) -> None:
    """Requests that had started end with an error; clients send them again."""
    self.counts.in_time -= requests
    if retried:
      self.counts.arrived += requests
      self._put(requests)

  def _put(self, requests: float) -> None:
    if requests > 0:
      self._queue.append((self.t_s, self.t_s, requests))
      self.waiting += requests

  def advance(self, to_s: float) -> None:
    """Time passes; nothing else happens."""
    while self.t_s < to_s:
      minute = int(self.t_s // MINUTE_S)
      if self._healthy is not None and self._is_healthy(minute):
        later = self._healthy.calm_before(int(to_s // MINUTE_S))
        if later > minute:
          self.counts.add(self._healthy.between(minute, later))
          self.t_s = later * MINUTE_S
          continue
      self._flow(min((minute + 1) * MINUTE_S, to_s), self.demand.at(minute))

  def _is_healthy(self, minute: int) -> bool:
    """Whether a minute begins, and no healthy group is another."""
    assert self._healthy is not None
    return (
      self.t_s == minute * MINUTE_S
      and self.calm
      and self._good
      and self._capacity == self._healthy.capacity
      and bool(self._healthy.calm[minute])
    )

  @property
  def calm(self) -> bool:
    """Nobody waits."""
    return not self._queue

  def _flow(self, end_s: float, rate: float) -> None:
    """A span of constant rates, cut where the queue empties or fills."""
    while self.t_s < end_s:
      net, left = rate - self._capacity, end_s - self.t_s
      room = self.demand.queue_limit - self.waiting
      if room < _NOBODY:
        room = 0.0
      if self.calm and net <= 0:
        self._count_at_once(rate * left)
        self.t_s = end_s
      elif net < 0 and self.waiting < -net * left:
        self._busy(self.t_s + self.waiting / -net, rate)
        self._queue.clear()  # what rounding has left
        self.waiting = 0.0
      elif net <= 0 or room >= net * left:
        self._busy(end_s, rate)
      elif room:
        self._busy(self.t_s + room / net, rate)
        self.waiting = self.demand.queue_limit
      else:  # as many are let in as start
        self.counts.arrived += net * left
        self.counts.refused += net * left
        self._busy(end_s, self._capacity)

  def _count_at_once(self, requests: float) -> None:
    self.counts.arrived += requests
    self.counts.started += requests
    self.counts.in_time += requests * self._good
    self.counts.at_once += requests

  def _busy(self, end_s: float, rate: float) -> None:
    """All that come in this span are queued; as many as can start."""
    start_s, span = self.t_s, end_s - self.t_s
    came, starts = rate * span, self._capacity * span
    self.counts.arrived += came
    if came > 0:
      self._queue.append((start_s, end_s, came))
    self.waiting = max(self.waiting + came - starts, 0.0)
    self.t_s, now = end_s, start_s
    while starts > _NOBODY and self._queue:
      first, last, n = self._queue.popleft()
      taken = min(n, starts)
      middle = first + (last - first) * taken / n
      then = now + taken / self._capacity
      self._parts.append((taken, now - first, then - middle))
      self.counts.started += taken
      if n - taken > _NOBODY:
        self._queue.appendleft((middle, last, n - taken))
      starts, now = starts - taken, then
    if self.calm:
      self.waiting = 0.0

  def _after_outage(self, since_s: float) -> None:
    """Clients that had waited for too long have gone, and others have come."""
    patience = self.demand.patience_s
    if self.t_s - since_s <= patience:
      return
    before, self._queue = self.waiting, collections.deque()
    t, self.waiting = self.t_s - patience, 0.0
    while t < self.t_s:
      minute = int(t // MINUTE_S)
      end = min((minute + 1) * MINUTE_S, self.t_s)
      room = self.demand.queue_limit - self.waiting
      n = min(self.demand.at(minute) * (end - t), room)
      if n > 0:
        self._queue.append((t, end, n))
        self.waiting += n
      t = end
    # Who came last had been refused for want of room; the others' turn now.
    self.counts.refused += before - self.waiting

  def _settle(self) -> None:
    """Counts the waits of those who have started since the last time."""
    if self._parts:
      waits, in_time = count_waits(
        np.array(self._parts), self.demand.wait_slo_s
      )
      self.counts.waits += waits
      self.counts.in_time += in_time * self._good
      self._parts = []

  def finish(self) -> Counts:
    """All that has happened; who still waits has not started."""
    self._settle()
    return self.counts


class Healthy:
  """A queue to which nothing happens, minute by minute."""

  def __init__(self, demand: Demand, capacity: float, minutes: int) -> None:
    self.capacity = capacity
    queue = Queue(demand, capacity)
    self.calm = np.zeros(minutes + 1, bool)
    self._flat = np.zeros((minutes + 1, 5))
    self._busy = np.zeros(minutes + 1, np.int64)  # row of `_waits`
    waits = [queue.counts.waits.copy()]
    for minute in range(minutes + 1):
      queue.advance(minute * MINUTE_S)
      self.calm[minute] = queue.calm
      if queue.calm:
        counts = queue.finish()
        if counts.waits[-1] != waits[-1][-1]:
          waits.append(counts.waits.copy())
        self._busy[minute] = len(waits) - 1
        self._flat[minute] = (
          counts.arrived, counts.refused, counts.started, counts.in_time,
          counts.at_once,
        )  # fmt: skip
    self._waits = np.array(waits)
    minute_of = np.where(self.calm, np.arange(minutes + 1), 0)
    self._last_calm = np.maximum.accumulate(minute_of)
    self.total = queue.finish()

  def calm_before(self, minute: int) -> int:
    """The last minute up to this one at whose start nobody waits."""
    return int(self._last_calm[min(minute, len(self._last_calm) - 1)])

  def between(self, first: int, last: int) -> Counts:
    """What happens from one such minute to another."""
    arrived, refused, started, in_time, at_once = (
      self._flat[last] - self._flat[first]
    ).tolist()
    waits = self._waits[self._busy[last]] - self._waits[self._busy[first]]
    return Counts(arrived, refused, started, in_time, at_once, waits)
