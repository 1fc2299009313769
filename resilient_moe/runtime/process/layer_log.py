"""What a worker's KV stream still has to send, in order and bounded.

A step is one item, or many if it is logged layer by layer: a `Log` of each
layer and the `Commit` that makes them count. The bound counts steps, whatever
they consist of.
"""

import threading
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from resilient_moe.runtime.process.mirror import Segment


class Step(NamedTuple):
  """A committed step at once."""

  segments: list[Segment]
  delta: Any  # [L, 1, n, 2K, d]


class Log(NamedTuple):
  """One layer of a step that may still run."""

  segment_id: int
  layer: int
  data: Any  # [n, 2K, d]
  lanes: Sequence[int] | None  # that are sent; None: all


class Commit(NamedTuple):
  """A step whose layers were logged counts."""

  segment_id: int
  segments: list[Segment]


class Rebase(NamedTuple):
  """A request's whole KV."""

  request_id: str
  kv: Any  # [L, 2K, tokens, d]


class Forget(NamedTuple):
  """Requests that have ended."""

  names: list[str]


class Drain:
  """Set when what was handed over before it has arrived, or can't any more."""

  def __init__(self) -> None:
    self.done = threading.Event()
    self.awaited = True  # else it may not answer for what was dropped
    self.arrived = False


Item = Step | Log | Commit | Rebase | Forget | Drain


class Backlog:
  """A queue that drops its oldest step or rebase when it is full.

  A logged step goes whole, its commit record included: what is left of it
  would only be refused. Not thread-safe.
  """

  def __init__(self, limit: int) -> None:
    """`limit`: of steps and rebases; what else there is takes no room."""
    self._limit = limit
    self._items: deque[tuple[float, Item]] = deque()
    self._units: Counter[Hashable] = Counter()  # items of each in the queue
    self._rebases = 0

  def __bool__(self) -> bool:
    return bool(self._items)

  def steps(self) -> int:
    """Those that are queued, in whole or in part."""
    return len(self._units) - self._rebases

  def has(self, item: Item | None) -> bool:
    """Whether there is anything of the step that `item` is of."""
    return _unit(item) in self._units

  def add(self, item: Item, now_s: float) -> bool:
    """Queues it; whether another had to go for it."""
    unit = _unit(item)
    full = (
      unit is not None
      and unit not in self._units
      and len(self._units) >= self._limit
    )
    if full:
      self._drop_oldest()
    self._items.append((now_s, item))
    if unit is not None:
      self._units[unit] += 1
      self._rebases += isinstance(item, Rebase)
    return full

  def take(self) -> tuple[float, Item]:
    """The oldest item, and when it was queued."""
    since_s, item = self._items.popleft()
    self._left(item)
    return since_s, item

  def clear(self) -> list[Drain]:
    """Empties it; who waits for what was queued."""
    drains = [item for _, item in self._items if isinstance(item, Drain)]
    self._items.clear()
    self._units.clear()
    self._rebases = 0
    return drains

  def _drop_oldest(self) -> None:
    oldest = next(u for _, i in self._items if (u := _unit(i)) is not None)
    kept: deque[tuple[float, Item]] = deque()
    for entry in self._items:
      if _unit(entry[1]) == oldest:
        self._left(entry[1])
      else:
        kept.append(entry)
    self._items = kept

  def _left(self, item: Item) -> None:
    unit = _unit(item)
    if unit is not None:
      self._units[unit] -= 1
      self._rebases -= isinstance(item, Rebase)
      if not self._units[unit]:
        del self._units[unit]


def _unit(item: Item | None) -> Hashable | None:
  """What the item counts as part of; None: it takes no room."""
  match item:
    case Log() | Commit():
      return item.segment_id
    case Step() | Rebase():
      return (id(item),)  # one by itself; in the queue, so no other has it
  return None
