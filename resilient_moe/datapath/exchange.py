"""The attention side (AW) of a layer's trip to the experts, and its healing.

`run` sends a layer's tokens to the expert ranks (EWs) and returns when every
assignment is in. An EW that dies on the way, or whose link does, is marked
down in this AW's own table and what it owed is sent elsewhere, without a word
from the orchestrator. Experts are pure functions and their outputs come back
unsummed, so the result is the same whoever served (after Tarragon).
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from resilient_moe.datapath import grouping
from resilient_moe.datapath.healing import HealingLimits, Lookout
from resilient_moe.datapath.parcels import Gone, Result, Transport
from resilient_moe.datapath.routes import (
  ExpertRoutes,
  ExpertsUnreachable,
  Member,
)


class ExchangeCancelled(Exception):
  """`cancel` was called: the step is to be given up."""


@dataclasses.dataclass(slots=True)
class _Sent:
  """A parcel that is out."""

  rank: int
  incarnation: int
  at: float
  where: np.ndarray  # [m] flat indices of its assignments


@dataclasses.dataclass(slots=True)
class _Lost:
  """Assignments that must be sent again, or that wait for a copy."""

  rank: int  # that owed them; -1: there was nobody to ask
  at: float  # since when they have been owed
  where: np.ndarray
  told: bool = False  # that they are unreachable


@dataclasses.dataclass(slots=True)
class _Step:
  """One run."""

  layer: int
  h: np.ndarray  # [N, D]
  experts: np.ndarray  # [N, k]
  y: np.ndarray  # [N * k, D]
  lost: list[_Lost] = dataclasses.field(default_factory=list)
  # Whose link is bad, though only they hold what they owe.
  cut: set[int] = dataclasses.field(default_factory=set)
  waiting: float | None = None  # since when `lost` and `cut` wait for a push
  waited: float = 0.0  # before


class Exchange:
  """One AW's exchange with the EWs; `run` is one thread's.

  `place` spreads the AWs over an expert's copies. `sent_bytes` and
  `returned_bytes` count embeddings, replays included; `healed` counts the
  parcels that were sent again.

  Events: ("healed", rank, layer, experts, seconds): `experts` experts of a
  lost parcel have been sent elsewhere `seconds` after they were first asked of
  `rank` (-1: of nobody, they had no copy). ("link_bad", rank, layer, seconds,
  elsewhere): an EW answers probes but owes since `seconds`; it is marked down
  if what it owes can be had `elsewhere`. Also told of one that was marked down
  so before, once experts are wanted that now only it holds. ("unreachable",
  layer, experts): the experts `experts` have no live copy. What can't be had
  elsewhere waits for a push, `HealingLimits.push_s` long.
  """

  def __init__(
    self,
    transport: Transport,
    routes: ExpertRoutes,
    limits: HealingLimits | None = None,
    *,
    place: int,
    dedup: bool = True,
    on_event: Callable[..., None] | None = None,
    now: Callable[[], float] = time.monotonic,
  ):
    self.sent_bytes = 0
    self.returned_bytes = 0
    self.healed = 0
    self._transport = transport
    self._routes = routes
    self._table = routes.table()
    self._limits = limits or HealingLimits()
    self._place = place
    self._dedup = dedup
    self._on_event = on_event or _nobody
    self._now = now
    self._cancel = threading.Event()
    self._ticket = 0
    self._sent: dict[int, _Sent] = {}
    self._lookout = Lookout(self._limits, transport)
    self._bad_links: set[Member] = set()  # marked down for their links alone
    # The process that each link was last used for. A link that ends was one to
    # this process, even if a push has named the next one since.
    self._met: dict[int, int] = {}

  @property
  def busy(self) -> bool:
    """Whether embeddings are out: the links aren't free for other streams."""
    return bool(self._sent)

  def cancel(self) -> None:
    """Makes `run` raise `ExchangeCancelled`, now and until `reset`."""
    self._cancel.set()

  def reset(self) -> None:
    """Lets `run` run again."""
    self._cancel.clear()

  def run(
    self, layer: int, h: np.ndarray, experts: np.ndarray, live: np.ndarray
  ) -> np.ndarray:
    """Each assignment's output, [N, k, D], unsummed; 0 where not `live`.

    Args:
      layer: the MoE layer.
      h: [N, D] the tokens.
      experts: [N, k] the experts that each is to see.
      live: [N] bool, which rows are tokens.

    Raises:
      ExpertsUnreachable: no push has brought a lost expert back in time.
      ExchangeCancelled: `cancel` was called.
    """
    return self.end(self.begin(layer, h, experts, live))

  def begin(
    self, layer: int, h: np.ndarray, experts: np.ndarray, live: np.ndarray
  ) -> _Step:
    """Sends everything; whoever drives several AWs then calls `end` of each."""
    (n, k), width = experts.shape, h.shape[1]
    if h.shape[0] != n or live.shape != (n,):
      raise ValueError(
        f"h {h.shape}, experts {experts.shape} and live {live.shape} differ "
        "in their number of tokens"
      )
    step = _Step(layer, h, experts, np.zeros((n * k, width), h.dtype))
    try:
      self._heal(step)
      wanted = grouping.assignments(live, k)
      self._dispatch(step, _Lost(-1, self._now(), wanted), first=True)
    except BaseException:
      self._forget()
      raise
    return step

  def end(self, step: _Step) -> np.ndarray:
    """Waits until every assignment is in; what `run` returns and raises."""
    try:
      self._collect(step)
    finally:
      self._forget()
    return step.y.reshape(*step.experts.shape, -1)

  def _forget(self) -> None:
    self._sent.clear()
    self._lookout.clear()

  def _collect(self, step: _Step) -> None:
    while True:
      if self._cancel.is_set():
        raise ExchangeCancelled(f"in layer {step.layer}")
      if not self._sent and not step.lost:
        return
      self._hear(step, self._limits.tick_s)
      # Looks come after hearing: what has arrived while this thread was held
      # up is not late.
      self._look(step)
      self._heal(step)
      self._check_waiting(step)

  def _dispatch(self, step: _Step, owed: _Lost, first: bool) -> None:
    """Sends what is owed to who serves it now; keeps what nobody does."""
    grouped = grouping.group_some(
      step.h, step.experts, owed.where, self._table, self._place, self._dedup,
      layer=step.layer,
    )  # fmt: skip
    send = self._transport.send if first else self._transport.send_urgent
    for rank, parcel in grouped.parcels.items():
      incarnation = self._table.incarnation(rank)
      assert incarnation is not None  # it names everybody it routes to
      self._ticket += 1
      sent = _Sent(rank, incarnation, self._now(), grouped.where[rank])
      self._sent[self._ticket] = sent  # before it goes out, for `busy`
      self._met[rank] = incarnation
      send(rank, self._ticket, parcel)
      self.sent_bytes += parcel.rows.nbytes
      sent.at = self._now()  # an EW isn't late for what was held up here
      self._lookout.owes(rank, sent.at)
    if grouped.missing:
      if not owed.told:
        self._on_event("unreachable", layer=step.layer, experts=grouped.missing)
        self._blame_links(step, grouped.missing, owed.at)
      step.lost.append(_Lost(owed.rank, owed.at, grouped.left, told=True))
    if grouped.parcels and not first:
      self.healed += len(grouped.parcels)
      again = np.concatenate(list(grouped.where.values()))
      self._on_event(
        "healed", rank=owed.rank, layer=step.layer,
        experts=len(np.unique(step.experts.reshape(-1)[again])),
        seconds=self._now() - owed.at,
      )  # fmt: skip

  def _hear(self, step: _Step, wait_s: float) -> None:
    for news in self._transport.receive(wait_s):
      if isinstance(news, Gone):
        met = self._met.get(news.rank)
        whose = met if news.incarnation is None else news.incarnation
        self._routes.down(news.rank, whose)
      else:
        self._take(step, news)

  def _take(self, step: _Step, result: Result) -> None:
    self.returned_bytes += result.y.nbytes
    sent = self._sent.pop(result.ticket, None)
    if sent is None:
      return  # of another run, or healed in the meantime
    shape = (len(sent.where), step.y.shape[1])
    if result.y.shape != shape or result.y.dtype != step.y.dtype:
      raise ValueError(
        f"rank {result.rank} returned {result.y.dtype}{result.y.shape} of "
        f"ticket {result.ticket}, expected {step.y.dtype}{shape}"
      )
    grouping.scatter(step.y, sent.where, result.y)
    of_rank = (s for s in self._sent.values() if s.rank == sent.rank)
    oldest = next(of_rank, None)
    since = None if oldest is None else oldest.at
    self._lookout.has_paid(sent.rank, since)
    step.cut.discard(sent.rank)

  def _look(self, step: _Step) -> None:
    """Probes the EWs that are late and judges them."""
    found = self._lookout.look(self._now())
    for rank in found.dead:
      self._routes.down(rank, self._met[rank])
    for rank, seconds in found.silent:
      self._judge_link(step, rank, seconds)

  def _judge_link(self, step: _Step, rank: int, seconds: float) -> None:
    owed = [s.where for s in self._sent.values() if s.rank == rank]
    experts = step.experts.reshape(-1)[np.concatenate(owed)]
    # It may just be slow; that is no reason to lose the only copy at once.
    elsewhere = self._table.elsewhere(experts, rank)
    if elsewhere:
      self._bad_links.add((rank, self._met[rank]))
      self._routes.down(rank, self._met[rank])
    if elsewhere or rank not in step.cut:
      self._tell_bad(step, rank, seconds, elsewhere)
    if not elsewhere:
      step.cut.add(rank)

  def _blame_links(
    self, step: _Step, missing: list[int], since: float
  ) -> None:
    """Tells of links that were spared for a copy which is gone by now."""
    wanted = np.array(missing)
    for rank, _ in sorted(self._table.down & self._bad_links):
      if rank not in step.cut and self._table.names(wanted, rank):
        step.cut.add(rank)
        self._tell_bad(step, rank, self._now() - since, elsewhere=False)

  def _tell_bad(
    self, step: _Step, rank: int, seconds: float, elsewhere: bool
  ) -> None:
    self._on_event(
      "link_bad", rank=rank, layer=step.layer, seconds=seconds,
      elsewhere=elsewhere,
    )  # fmt: skip

  def _heal(self, step: _Step) -> None:
    """Follows the table: sends again what its present state doesn't cover."""
    if self._routes.table() is self._table:
      return
    # Ends of links that are waiting to be heard are of processes met so far,
    # not of the ones that the new table may name.
    self._hear(step, 0.0)
    table = self._table = self._routes.table()
    owed, step.lost = step.lost, []
    for ticket, sent in list(self._sent.items()):
      if not table.serves(sent.rank, sent.incarnation):
        del self._sent[ticket]
        self._lookout.forget(sent.rank)
        step.cut.discard(sent.rank)
        owed.append(_Lost(sent.rank, sent.at, sent.where))
    for lost in owed:
      self._dispatch(step, lost, first=False)

  def _check_waiting(self, step: _Step) -> None:
    """Gives up if what waits for a copy has none coming."""
    now = self._now()
    stuck = [lost.where for lost in step.lost]
    stuck += [s.where for s in self._sent.values() if s.rank in step.cut]
    if not stuck:
      if step.waiting is not None:
        step.waited += now - step.waiting
        step.waiting = None
      return
    if step.waiting is None:
      step.waiting = now
    experts = np.unique(step.experts.reshape(-1)[np.concatenate(stuck)])
    masked = experts[self._table.masked[experts]]
    if masked.size:
      raise ExpertsUnreachable(masked.tolist(), masked=True)
    if step.waited + now - step.waiting >= self._limits.push_s:
      raise ExpertsUnreachable(experts.tolist(), masked=False)


def _nobody(name: str, **facts: Any) -> None:
  """Who listens to events by default."""
