"""KV checkpoints that trail the steps, as `runtime.kv_checkpoint` keeps them.

What is on its way when its rank dies is lost; a mirror with a peer dies with
that peer. Only whole prefixes are committed.
"""

from collections.abc import Callable
from typing import NamedTuple

from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.tokens import Delta, Held


class Copy(NamedTuple):
  """The commit record of a request."""

  held: Held
  holder: int  # rank whose memory it counts as; -1: the host's


class Copies:
  """Who keeps whose KV, and how far it has come."""

  def __init__(
    self, mode: str, clock: VirtualClock, lag_s: Callable[[int], float],
    token_bytes: int,
  ) -> None:  # fmt: skip
    """`mode`: none, peer or host; `lag_s`: of so many positions of a rank."""
    self.mode = mode
    self.ring: tuple[int, ...] = ()  # ranks, each mirrors for the one before
    self.nbytes = 0  # streamed so far
    self._clock, self._lag_s = clock, lag_s
    self._token_bytes = token_bytes
    self._kept: dict[str, Copy] = {}
    self._dead: set[int] = set()
    self._arrives_s: dict[int, float] = {}  # rank -> its last segment
    self.underway = 0  # steps of ranks that are not committed yet

  def records(self) -> dict[str, tuple[int, int]]:
    """Request -> (positions committed, holder)."""
    return {n: (c.held.tokens, c.holder) for n, c in self._kept.items()}

  def restore(self, name: str) -> Held | None:
    """The committed KV of a request."""
    copy = self._kept.get(name)
    return copy.held if copy and copy.held.tokens else None

  def holder(self, rank: int) -> int:
    """Who mirrors for a rank: the next in the ring, or the host."""
    if self.mode == "host" or len(self.ring) == 1:
      return -1
    return self.ring[(self.ring.index(rank) + 1) % len(self.ring)]

  def stream(self, batch: StepBatch, delta: Delta) -> None:
    """A committed step leaves its ranks; never waited for."""
    if self.mode == "none":
      return
    starts = {r.request_id: r.position for r in batch.rows}
    starts |= {c.request_id: c.start for c in batch.chunks}
    for name in batch.retired:
      self._kept.pop(name, None)
    by_rank: dict[int, list[tuple[int, Held]]] = {}
    for (rank, _), held in delta.items():
      by_rank.setdefault(rank, []).append((starts[held.request_id], held))
    for rank, segments in by_rank.items():
      self._send(rank, segments)

  def _send(self, rank: int, segments: list[tuple[int, Held]]) -> None:
    """In order: a rank's later step arrives behind its earlier one."""
    positions = sum(held.tokens - start for start, held in segments)
    lag_s = self._lag_s(positions)
    holder = self.holder(rank)
    if not lag_s:
      self._arrive(rank, holder, segments)
      return
    at_s = max(self._clock.now() + lag_s, self._arrives_s.get(rank, 0.0))
    self._arrives_s[rank] = at_s
    self.underway += 1

    def arrive() -> None:
      self.underway -= 1
      self._arrive(rank, holder, segments)

    self._clock.at(at_s, arrive)

  def _arrive(
    self, rank: int, holder: int, segments: list[tuple[int, Held]]
  ) -> None:
    if rank in self._dead or holder in self._dead:
      return
    for start, held in segments:
      nothing = Copy(Held(held.request_id, 0, 0), holder)
      before = self._kept.setdefault(held.request_id, nothing)
      if start > before.held.tokens:
        continue  # a gap: `rebase` fills it
      keeps = holder if start == 0 else before.holder
      self._kept[held.request_id] = Copy(held, keeps)
      self.nbytes += (held.tokens - start) * self._token_bytes

  def rebase(self, held: Held, rank: int) -> bool:
    """A request's whole KV anew from its rank: its last holder is gone.

    False: whom it would go to is dead too, and nobody has noticed.
    """
    holder = self.holder(rank)
    if holder in self._dead:
      return False
    self._kept[held.request_id] = Copy(held, holder)
    return True

  def forget_rank(self, rank: int) -> None:
    """The rank is dead, and what it kept, and what it had not sent."""
    self._dead.add(rank)
    self._kept = {n: c for n, c in self._kept.items() if c.holder != rank}

  def remember_rank(self, rank: int) -> None:
    """A replacement of this rank serves."""
    self._dead.discard(rank)
