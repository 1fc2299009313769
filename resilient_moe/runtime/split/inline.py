"""Links between ranks of one process: an expert rank computes when asked.

Faults strike here, between two things that happen: `hook(place, rank, layer)`
is called where a rank attends, has a parcel, or computes it, and may delete
what ranks hold (or end the step by raising).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from resilient_moe.datapath.parcels import Gone, Parcel, Result
from resilient_moe.runtime.split.experts import ExpertRank

# (attention | exchange | experts, rank, layer)
Hook = Callable[[str, int, int], None]


class InlineLinks:
  """All links of a process, and what is wrong with them."""

  def __init__(self, experts: Mapping[int, ExpertRank]) -> None:
    self.experts = experts
    self.cut: set[tuple[int, int]] = set()  # (attention, expert) ranks
    self.delay_s: dict[tuple[int, int], float] = {}
    self._transports: dict[int, InlineTransport] = {}

  def of(self, rank: int) -> "InlineTransport":
    """An attention rank's links."""
    self._transports[rank] = InlineTransport(rank, self)
    return self._transports[rank]

  @contextlib.contextmanager
  def hooked(self, rank: int, hook: Hook) -> Iterator[None]:
    """Calls `hook` while the attention rank does a step."""
    transport = self._transports[rank]
    transport.hook = hook
    try:
      yield
    finally:
      transport.hook = _nothing


class InlineTransport:
  """One attention rank's links (`datapath.parcels.Transport`)."""

  def __init__(self, rank: int, links: InlineLinks) -> None:
    self._rank = rank
    self._links = links
    self._inbox: list[tuple[float, Result | Gone]] = []  # due at
    self._layer = -1
    self.hook: Hook = _nothing

  def send(self, rank: int, ticket: int, parcel: Parcel) -> None:
    if parcel.layer != self._layer:  # the first of a layer
      self._layer = parcel.layer
      self.hook("attention", self._rank, parcel.layer)
    self.hook("exchange", rank, parcel.layer)
    link = (self._rank, rank)
    if link in self._links.cut:
      return
    due = time.monotonic() + self._links.delay_s.get(link, 0.0)
    self.hook("experts", rank, parcel.layer)
    expert = self._links.experts.get(rank)
    if expert is None:
      self._inbox.append((due, Gone(rank)))
      return
    y = expert.compute(parcel.layer, parcel.rows, parcel.token, parcel.slot)
    self._inbox.append((due, Result(rank, ticket, y)))

  def send_urgent(self, rank: int, ticket: int, parcel: Parcel) -> None:
    self.send(rank, ticket, parcel)  # nobody waits: it is computed at once

  def receive(self, wait_s: float) -> list[Result | Gone]:
    now = time.monotonic()
    here = [news for due, news in self._inbox if due <= now]
    if not here and wait_s:
      time.sleep(wait_s)
    self._inbox = [(due, news) for due, news in self._inbox if due > now]
    return here

  def answers(self, rank: int) -> bool:
    return rank in self._links.experts


def _nothing(place: str, rank: int, layer: int) -> None:
  del place, rank, layer
