"""Where an attention rank (AW) finds each expert: its expert routing table.

The orchestrator pushes `Routes`; the AW marks expert ranks (EWs) down by
itself when it sees them dead, before the orchestrator has spoken. Both arrive
in any order and the table ends in the same state (eventually consistent), as
long as a process that has left the table doesn't come back to it under the
same incarnation. If it does, the orchestrator has judged it anew and what the
AW held against it is forgotten, as far as the pushes come in order.

Lookups read an immutable compiled `LiveTable`, so they take no lock.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

Member = tuple[int, int]  # (rank, incarnation): one process


class ExpertsUnreachable(Exception):
  """No live EW holds `experts`; `masked`: the gate must choose others."""

  def __init__(self, experts: list[int], masked: bool):
    why = "masked since they were chosen" if masked else "no push brought them"
    super().__init__(f"experts {experts} have no live copy: {why}")
    self.experts = experts
    self.masked = masked


class Routes(NamedTuple):
  """What the orchestrator pushes; immutable."""

  epoch: int
  serving: np.ndarray  # [E, C, 2] int32 (rank, slot) that serve; -1 pads
  standby: np.ndarray  # [E, C2, 2] int32 shadows: serve once promoted
  incarnations: Mapping[int, int]  # EW rank -> which of its processes is meant
  masked: np.ndarray  # [E] bool: hidden from the gate


class LiveTable:
  """`Routes` less what this AW knows to be down; immutable.

  Two tables of one `ExpertRoutes` with the same `version` are the same object.
  """

  def __init__(
    self,
    routes: Routes,
    named: Mapping[int, int],
    down: frozenset[Member],
    version: int,
  ):
    self.epoch = routes.epoch
    self.masked = routes.masked
    self.down = down
    self.version = version
    self._routes = routes
    self._named = named
    self._live = {r: i for r, i in named.items() if (r, i) not in down}
    serving = self._surviving(routes.serving)
    standby = self._surviving(routes.standby)
    self._holders = np.concatenate([serving, standby], axis=1)[:, :, 0]
    copies = (serving[:, :, 0] >= 0).sum(axis=1)
    # A shadow is promoted only where nobody serves, and is then alone.
    table = np.where((copies > 0)[:, None, None], serving, standby[:, :1])
    self._width = table.shape[1]
    self._rank = np.ascontiguousarray(table[:, :, 0]).reshape(-1)
    self._slot = np.ascontiguousarray(table[:, :, 1]).reshape(-1)
    self._copies = np.maximum(copies, 1).astype(np.int32)
    self._spreads = bool((copies > 1).any())

  def _surviving(self, entries: np.ndarray) -> np.ndarray:
    """Live copies first, in the table's order, then -1; [E, >= 1, 2] int32."""
    pad = np.full((entries.shape[0], 1, 2), -1, np.int32)
    entries = np.concatenate([entries.astype(np.int32), pad], axis=1)
    alive = np.isin(entries[:, :, :1], list(self._live))
    order = np.argsort(~alive[:, :, 0], axis=1, kind="stable")[:, :, None]
    kept = np.take_along_axis(np.where(alive, entries, -1), order, axis=1)
    return kept[:, : max(1, kept.shape[1] - 1)]

  def lookup(
    self, experts: np.ndarray, spread: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """(rank [n], slot [n]) of a live copy of each expert; -1: there is none.

    Of several copies that serve, number `spread` modulo their count.
    """
    at = experts * self._width
    if self._spreads:
      at = at + spread % self._copies[experts]
    return self._rank[at], self._slot[at]

  def unreachable(self, experts: np.ndarray) -> list[int]:
    """Those of `experts` without a live copy, sorted, each once."""
    asked = np.unique(np.asarray(experts, np.int64))
    return asked[self._rank[asked * self._width] < 0].tolist()

  def elsewhere(self, experts: np.ndarray, rank: int) -> bool:
    """Whether each expert has a live copy, or shadow, on another rank."""
    holders = self._holders[experts]
    return bool(((holders >= 0) & (holders != rank)).any(axis=1).all())

  def names(self, experts: np.ndarray, rank: int) -> bool:
    """Whether the rank is to have a copy of any of them, down or not."""
    r = self._routes
    return any(
      bool((entries[experts, :, 0] == rank).any())
      for entries in (r.serving, r.standby)
    )

  def incarnation(self, rank: int) -> int | None:
    """The process that the table means by `rank`; None: it names none."""
    return self._named.get(rank)

  def serves(self, rank: int, incarnation: int) -> bool:
    """Whether the process is in the table and not known to be down."""
    return self._live.get(rank) == incarnation


class ExpertRoutes:
  """The expert routing table of one AW. Any thread may call any method."""

  def __init__(self, routes: Routes):
    self._lock = threading.Lock()
    self._routes = routes
    self._named = _named(routes)
    # The newest process of each rank that a table has named. Marks above it
    # are news of processes that no table has named yet, and are kept.
    self._newest = dict(self._named)
    self._marks: set[Member] = set()
    self._live = LiveTable(routes, self._named, frozenset(), 0)

  @property
  def version(self) -> int:
    """Grows with everything that changes lookups."""
    return self._live.version

  def table(self) -> LiveTable:
    """What lookups see now, for several that must agree."""
    return self._live

  def push(self, routes: Routes) -> bool:
    """Adopts what the orchestrator says, unless it is old news."""
    named = _named(routes)
    with self._lock:
      if routes.epoch <= self._routes.epoch:
        return False
      if routes.masked.shape != self._routes.masked.shape:
        raise ValueError(
          f"routes of {routes.masked.shape[0]} experts pushed to a table of "
          f"{self._routes.masked.shape[0]}: the count can't change"
        )
      self._routes, self._named = routes, named
      for rank, incarnation in named.items():
        newest = self._newest.get(rank, incarnation)
        self._newest[rank] = max(newest, incarnation)
      self._marks = {
        (rank, incarnation)
        for rank, incarnation in self._marks
        if named.get(rank) == incarnation or self._is_news(rank, incarnation)
      }
      self._compile()
      return True

  def down(self, rank: int, incarnation: int | None = None) -> bool:
    """This AW found an EW, or its link to it, dead; False: known or no more.

    Without `incarnation`, the process that the table names now.
    """
    with self._lock:
      now = self._named.get(rank)
      meant = now if incarnation is None else incarnation
      if meant is None or (rank, meant) in self._marks:
        return False
      if meant != now and not self._is_news(rank, meant):
        return False  # a process that the table has left behind
      self._marks.add((rank, meant))
      if meant == now:
        self._compile()
      return meant == now

  def up(self, rank: int) -> bool:
    """The link to the process that the table names works again."""
    with self._lock:
      member = (rank, self._named.get(rank, -1))
      if member not in self._marks:
        return False
      self._marks.remove(member)
      self._compile()
      return True

  def lookup(
    self, experts: np.ndarray, spread: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `LiveTable.lookup`."""
    return self._live.lookup(experts, spread)

  def unreachable(self, experts: np.ndarray) -> list[int]:
    """See `LiveTable.unreachable`."""
    return self._live.unreachable(experts)

  def state(self) -> tuple[int, frozenset[Member]]:
    """(epoch, processes that are down and that the table still names)."""
    live = self._live
    return live.epoch, live.down

  def _is_news(self, rank: int, incarnation: int) -> bool:
    """Whether no adopted table has named the process, or a newer, yet."""
    newest = self._newest.get(rank)
    return newest is None or incarnation > newest

  def _compile(self) -> None:
    down = frozenset(self._marks & set(self._named.items()))
    self._live = LiveTable(
      self._routes, self._named, down, self._live.version + 1
    )


def _named(routes: Routes) -> dict[int, int]:
  """Rank -> incarnation of the processes that hold a copy; checks the rest."""
  experts = routes.masked.shape[0]
  for field in ("serving", "standby"):
    shape = getattr(routes, field).shape
    if len(shape) != 3 or shape[0] != experts or shape[2] != 2:
      raise ValueError(
        f"routes.{field} has shape {shape}, expected ({experts}, copies, 2): "
        "a (rank, slot) of each copy of each expert"
      )
  ranks = _ranks((routes.serving, routes.standby))
  nameless = [r for r in ranks if r not in routes.incarnations]
  if nameless:
    raise ValueError(
      f"routes name ranks {nameless} without an incarnation; known are "
      f"{sorted(routes.incarnations)}"
    )
  return {rank: routes.incarnations[rank] for rank in ranks}


def _ranks(tables: Iterable[np.ndarray]) -> list[int]:
  found = np.concatenate([entries[:, :, 0].reshape(-1) for entries in tables])
  return np.unique(found[found >= 0]).tolist()
