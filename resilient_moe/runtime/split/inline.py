"""Links between ranks of one process: an expert rank computes when asked.

Faults strike here, between two things that happen: `hook(place, rank, layer)`
is called where a rank attends, has a parcel, or computes it, and may delete
what ranks hold (or end the step by raising).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from resilient_moe.datapath.gather import merge, split
from resilient_moe.datapath.parcels import Gone, Parcel, Result
from resilient_moe.runtime.split.experts import Begun, ExpertRank, read
from resilient_moe.serving.backend import StepAborted

# (attention | exchange | experts, rank, layer)
Hook = Callable[[str, int, int], None]


Link = tuple[int, int]  # (attention, expert) ranks


class InlineLinks:
  """All links of a process, and what is wrong with them."""

  def __init__(self, experts: Mapping[int, ExpertRank]) -> None:
    self.experts = experts
    self.cut: set[Link] = set()
    self.delay_s: dict[Link, float] = {}
    # Which of a rank's processes its device stands for; 0 if it isn't there.
    self.incarnations: dict[int, int] = {}
    self._mends: dict[Link, float] = {}  # when, monotonic
    self.queue: list[_Queued] = []
    self._transports: dict[int, InlineTransport] = {}

  def of(self, rank: int) -> "InlineTransport":
    """An attention rank's links, anew."""
    self._transports[rank] = InlineTransport(rank, self)
    return self._transports[rank]

  def spoil(
    self, link: Link, delay_s: float | None, lasts_s: float | None
  ) -> None:
    """Makes a link slow by `delay_s`, or cuts it (None).

    `lasts_s`: until it is mended; None: never.
    """
    if delay_s is None:
      self.cut.add(link)
    else:
      self.delay_s[link] = delay_s
    self._mends.pop(link, None)
    if lasts_s is not None:
      self._mends[link] = time.monotonic() + lasts_s

  def mend(self) -> list[Link]:
    """Mends the links whose time has come; which they are."""
    now = time.monotonic()
    mended = [link for link, at in self._mends.items() if at <= now]
    for link in mended:
      self._as_new(link)
    return mended

  def end(self, rank: int) -> None:
    """The rank is gone: whoever takes its place has links of its own."""
    for link in {*self.cut, *self.delay_s, *self._mends}:
      if rank in link:
        self._as_new(link)

  def _as_new(self, link: Link) -> None:
    self.cut.discard(link)
    self.delay_s.pop(link, None)
    self._mends.pop(link, None)

  def hook(self, rank: int, hook: Hook | None) -> None:
    """Calls `hook` from now on where the attention rank's step is."""
    self._transports[rank].begin(hook or _nothing)
    self.queue = [q for q in self.queue if q.sender.rank != rank]

  def compute(self) -> None:
    """What has been sent so far, each expert rank a layer's at once."""
    queue, self.queue = self.queue, []
    groups: dict[tuple[int, int], list[_Queued]] = {}
    for q in queue:
      groups.setdefault((q.rank, q.parcel.layer), []).append(q)
    begun = [self._begin(rank, layer, b) for (rank, layer), b in groups.items()]
    for batch, y, splits in begun:
      parts = split(read(y), splits) if batch else []
      for q, part in zip(batch, parts, strict=True):
        q.sender.put(q.rank, Result(q.rank, q.ticket, part))

  def _begin(
    self, rank: int, layer: int, batch: "list[_Queued]"
  ) -> "tuple[list[_Queued], Begun, Sequence[int]]":
    """Computes a layer's parcels of an expert rank, if it is there."""
    batch = [q for q in batch if q.sender.reaches("experts", rank, layer)]
    expert = self.experts.get(rank)
    if expert is None:
      gone = Gone(rank, self.incarnations.get(rank, 0))
      for q in batch:
        q.sender.put(rank, gone)
      return [], [], ()
    if not batch:
      return [], [], ()
    rows, token, names, splits = merge([q.parcel for q in batch])
    return batch, expert.begin(layer, rows, token, names), splits


class _Queued(NamedTuple):
  """A parcel that has arrived and waits to be computed."""

  sender: "InlineTransport"
  rank: int
  ticket: int
  parcel: Parcel


class InlineTransport:
  """One attention rank's links (`datapath.parcels.Transport`)."""

  def __init__(self, rank: int, links: InlineLinks) -> None:
    self.rank = rank
    self._links = links
    self._inbox: list[tuple[float, Result | Gone]] = []  # due at
    self.begin(_nothing)

  def begin(self, hook: Hook) -> None:
    """A step begins, or has ended."""
    self._hook = hook
    self._layer = -1
    self._aborted = False

  def send(self, rank: int, ticket: int, parcel: Parcel) -> None:
    if parcel.layer != self._layer:  # the first of a layer
      self._layer = parcel.layer
      self._hook("attention", self.rank, parcel.layer)
    self._hook("exchange", rank, parcel.layer)
    link = (self.rank, rank)
    if link in self._links.cut:
      return
    self._links.queue.append(_Queued(self, rank, ticket, parcel))

  def reaches(self, place: str, rank: int, layer: int) -> bool:
    """Whether the step goes on behind a place where a fault may strike."""
    try:
      self._hook(place, rank, layer)
    except StepAborted:
      self._aborted = True  # told when this rank asks, whoever computes now
    return not self._aborted

  def put(self, rank: int, news: Result | Gone) -> None:
    """It arrives once the link has carried it."""
    late_s = self._links.delay_s.get((self.rank, rank), 0.0)
    self._inbox.append((time.monotonic() + late_s, news))

  def send_urgent(self, rank: int, ticket: int, parcel: Parcel) -> None:
    self.send(rank, ticket, parcel)  # nobody waits: it is computed at once

  def receive(self, wait_s: float) -> list[Result | Gone]:
    self._links.compute()
    if self._aborted:
      raise StepAborted
    here = self._take()
    if not here and wait_s:
      now = time.monotonic()
      due = min((at for at, _ in self._inbox), default=now + wait_s)
      time.sleep(max(min(due - now, wait_s), 0))
      # Again: what came while a busy machine held this up is not late.
      here = self._take()
    return here

  def _take(self) -> list[Result | Gone]:
    now = time.monotonic()
    here = [news for due, news in self._inbox if due <= now]
    self._inbox = [(due, news) for due, news in self._inbox if due > now]
    return here

  def answers(self, rank: int) -> bool:
    return rank in self._links.experts


def _nothing(place: str, rank: int, layer: int) -> None:
  del place, rank, layer
