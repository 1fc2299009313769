"""Expert ranks as functions, on a clock of their own: what the tests break.

`FakeLinks` is an AW's transport to EWs that answer after `delay_s`. Scripts
act at a time, before a send or after a result; nothing runs in parallel, so
every moment of a step can be visited.
"""

import heapq
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from resilient_moe.datapath.exchange import Exchange
from resilient_moe.datapath.parcels import Gone, Parcel, Result
from resilient_moe.datapath.routes import ExpertRoutes, Routes

E, LAYERS = 8, 3
# Every expert on two EWs of four; what a death leaves, a third one holds.
DOUBLE = {e: [(e % 4, e // 4), ((e + 1) % 4, 2 + e // 4)] for e in range(E)}
SHADOWS = {e: [((e + 2) % 4, 4 + e // 4)] for e in range(E)}
EVERYWHERE = {e: [(r, e) for r in range(4)] for e in range(E)}
SINGLE = {e: [(e % 4, e // 4)] for e in range(E)}

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # h, experts, live

FOREVER_S = 100.0  # of a run that doesn't end
DELAY_S = 0.001  # of an EW that nothing is said about


def _tokens(n: int, k: int) -> Batch:
  rng = np.random.default_rng(0)
  h = rng.standard_normal((n, 4)).astype(np.float32)
  experts = np.stack([rng.permutation(E)[:k] for _ in range(n)])
  return h, experts.astype(np.int32), np.arange(n) != 1


BATCH = _tokens(6, 2)
# An expert for each assignment: every EW of four is asked for two.
ALL = BATCH[0][:4], np.arange(8, dtype=np.int32).reshape(4, 2), np.ones(4, bool)


def expert(e: int, rows: np.ndarray) -> np.ndarray:
  """What expert `e` does to a row, the same in any company."""
  return np.tanh(rows * np.float32(1 + e)) + np.float32(0.1 * e)


def answers(h: np.ndarray, experts: np.ndarray, live: np.ndarray) -> np.ndarray:
  """What an exchange is to return, [N, k, D]."""
  y = np.zeros((*experts.shape, h.shape[1]), h.dtype)
  for t, i in np.ndindex(*experts.shape):
    if live[t]:
      y[t, i] = expert(int(experts[t, i]), h[t])
  return y


def routes(
  epoch: int,
  serving: Mapping[int, list[tuple[int, int]]],
  standby: Mapping[int, list[tuple[int, int]]] | None = None,
  incarnations: Mapping[int, int] | None = None,
  masked: tuple[int, ...] = (),
) -> Routes:
  """Routes of experts 0..E-1, expert -> its (rank, slot)s in `serving`."""
  n = len(serving)
  tables = [_table(n, serving), _table(n, standby or {})]
  ranks = {r for t in tables for r in t[:, :, 0].reshape(-1).tolist() if r >= 0}
  meant = dict.fromkeys(ranks, 0) | dict(incarnations or {})
  hidden = np.isin(np.arange(n), masked)
  return Routes(epoch, tables[0], tables[1], meant, hidden)


def _table(n: int, copies: Mapping[int, list[tuple[int, int]]]) -> np.ndarray:
  width = max([1, *map(len, copies.values())])
  table = np.full((n, width, 2), -1, np.int32)
  for e, places in copies.items():
    table[e, : len(places)] = places or np.zeros((0, 2))
  return table


def held(*tables: Routes) -> dict[tuple[int, int], int]:
  """(rank, slot) -> the expert there, in any of the tables."""
  found = {}
  for table in tables:
    for entries in (table.serving, table.standby):
      for e, c in np.argwhere(entries[:, :, 0] >= 0):
        rank, slot = entries[e, c].tolist()
        found[rank, slot] = int(e)
  return found


class FakeLinks:
  """A `Transport`; also its clock, `links.now`."""

  def __init__(self, slots: Mapping[tuple[int, int], int]):
    self.slots = dict(slots)
    self.time = 0.0
    self.delay_s: dict[int, float] = {}
    self.log: list[tuple[int, int, Parcel, bool]] = []  # ..., urgent
    self.probes: list[tuple[float, int]] = []
    self.together = False  # hand over all that has come, as sockets do
    self.results = 0  # how many have been delivered
    self._dead: set[int] = set()
    self._cut: set[int] = set()
    self._queue: list[tuple[float, int, Any]] = []
    self._count = 0
    self._scripts: dict[tuple[str, int], list[Callable[[], None]]] = {}

  def now(self) -> float:
    return self.time

  # What tests do to it.

  def kill(self, rank: int, silent: bool = False) -> None:
    """Ends an EW, and what it has not delivered; `silent`: no Gone either."""
    self._dead.add(rank)
    if not silent:
      self._put(0.0, Gone(rank))

  def start(self, rank: int) -> None:
    """The rank's next process."""
    self._dead.discard(rank)

  def cut(self, rank: int) -> None:
    """Embeddings no longer reach the EW, which lives and answers probes."""
    self._cut.add(rank)

  def mend(self, rank: int) -> None:
    """The next embeddings reach the EW again; the lost ones are lost."""
    self._cut.discard(rank)

  def after(self, seconds: float, act: Callable[[], None]) -> None:
    self._put(seconds, act)

  def script(self, moment: str, n: int, act: Callable[[], None]) -> None:
    """Acts before the n-th "send" or after the n-th "result", from 0."""
    self._scripts.setdefault((moment, n), []).append(act)

  # What the exchange does with it.

  def send(self, rank: int, ticket: int, parcel: Parcel) -> None:
    self._send(rank, ticket, parcel, urgent=False)

  def send_urgent(self, rank: int, ticket: int, parcel: Parcel) -> None:
    self._send(rank, ticket, parcel, urgent=True)

  def receive(self, wait_s: float) -> list[Result | Gone]:
    found = self._next(self.time + wait_s)
    while self.together and found and (more := self._next(self.time)):
      found = found + more
    return found

  def _next(self, until: float) -> list[Result | Gone]:
    assert until < FOREVER_S, "the run doesn't end"
    while self._queue and self._queue[0][0] <= until:
      at, _, item = heapq.heappop(self._queue)
      self.time = max(self.time, at)
      if isinstance(item, Gone):
        return [item]
      if isinstance(item, Result):
        if item.rank not in self._dead:
          self.results += 1
          self._act("result", self.results - 1)
          return [item]
      else:
        item()
    self.time = until
    return []

  def answers(self, rank: int) -> bool:
    self.probes.append((self.time, rank))
    return rank not in self._dead

  def _send(self, rank: int, ticket: int, parcel: Parcel, urgent: bool) -> None:
    self._act("send", len(self.log))
    self.log.append((rank, ticket, parcel, urgent))
    if rank in self._dead | self._cut:
      return
    y = np.empty((len(parcel.slot), parcel.rows.shape[1]), parcel.rows.dtype)
    for i, (row, slot) in enumerate(
      zip(parcel.token, parcel.slot, strict=True)
    ):
      y[i] = expert(self.slots[rank, int(slot)], parcel.rows[row])
    delay = self.delay_s.get(rank, DELAY_S * (1 + rank / 10))
    self._put(delay, Result(rank, ticket, y))

  def _act(self, moment: str, n: int) -> None:
    for act in self._scripts.pop((moment, n), []):
      act()

  def _put(self, seconds: float, item: Any) -> None:
    self._count += 1
    heapq.heappush(self._queue, (self.time + seconds, self._count, item))


class Scene:
  """An exchange, its table, its links, and what it told."""

  def __init__(self, *tables, **kwargs):
    self.routes = ExpertRoutes(tables[0])
    self.links = FakeLinks(held(*tables))
    self.events: list[tuple[str, dict]] = []
    kwargs = {"place": 0} | kwargs
    self.exchange = Exchange(
      self.links, self.routes, now=self.links.now,
      on_event=lambda name, **facts: self.events.append((name, facts)),
      **kwargs,
    )  # fmt: skip

  def told(self, name: str) -> list[dict]:
    return [facts for event, facts in self.events if event == name]

  def check_step(self) -> None:
    """Runs all layers of `BATCH`: each is exact, and feeds the next."""
    h, experts, live = BATCH
    for layer in range(LAYERS):
      self.check_run(layer, (h, np.roll(experts, layer, axis=0), live))
      h = h + answers(h, np.roll(experts, layer, axis=0), live).sum(axis=1)

  def check_run(self, layer: int = 0, batch: Batch | None = None) -> None:
    """Runs a layer, of `ALL` by default: every bit is right."""
    batch = batch or ALL
    y = self.exchange.run(layer, *batch)
    np.testing.assert_array_equal(y, answers(*batch))
    assert not self.exchange.busy
