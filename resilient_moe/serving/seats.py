"""Where each request's KV lies, as a backend knows it from the batches."""

from collections.abc import Iterable
from typing import NamedTuple

from resilient_moe.serving.backend import Placed
from resilient_moe.serving.scheduler import StepBatch


class Seat(NamedTuple):
  """Where a request's KV lies, and how much of it."""

  rank: int
  row: int
  tokens: int


class Seats:
  """The seats of all requests in flight."""

  def __init__(self) -> None:
    self._of: dict[str, Seat] = {}

  def note(self, batch: StepBatch, committed: bool) -> None:
    """Notes where requests are, and, after the commit, how far."""
    for name in batch.retired:
      self._of.pop(name, None)
    for r in batch.rows:
      tokens = r.position + int(committed)
      self._of[r.request_id] = Seat(batch.mesh[r.place], r.row, tokens)
    for c in batch.chunks:
      tokens = c.start + c.length * int(committed)
      self._of[c.request_id] = Seat(batch.mesh[c.place], c.row, tokens)

  def moved(self, placed: Placed) -> None:
    """A request has a new seat, with nothing known to lie there."""
    self._of[placed.request_id] = Seat(placed.rank, placed.row, 0)

  def get(self, request_id: str) -> Seat | None:
    return self._of.get(request_id)

  def items(self) -> list[tuple[str, Seat]]:
    return list(self._of.items())

  def on(self, ranks: Iterable[int]) -> list[str]:
    """Requests that sit on any of these ranks, sorted."""
    ranks = set(ranks)
    return sorted(n for n, seat in self._of.items() if seat.rank in ranks)
