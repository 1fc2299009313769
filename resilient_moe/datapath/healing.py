"""When an attention rank (AW) takes an expert rank (EW), or a link, for dead.

An EW that owes a result for too long is probed. One that answers no probe is
dead; one that answers but sends nothing has a bad link, or is very slow.
"""

import dataclasses
from typing import NamedTuple

from resilient_moe.datapath.parcels import Transport


@dataclasses.dataclass(frozen=True)
class HealingLimits:
  """How long an AW waits for what, in seconds."""

  late_s: float = 0.03  # a parcel is late: probe, once in each such period
  misses: int = 2  # unanswered probes in a row that make an EW dead
  link_s: float = 0.5  # it answers, but sends nothing: the link is bad
  push_s: float = 0.25  # for a push that helps where no copy can be reached,
  # in all of a run
  tick_s: float = 0.005  # the longest sleep, so how soon a cancel is seen

  def __post_init__(self) -> None:
    for name in ("late_s", "link_s", "tick_s"):
      if getattr(self, name) <= 0:
        raise ValueError(
          f"{name}={getattr(self, name)}: must be above 0 seconds"
        )
    if self.push_s < 0:
      raise ValueError(
        f"push_s={self.push_s}: must be 0 seconds, which waits for no push, "
        "or more"
      )
    if self.misses < 1:
      raise ValueError(
        f"misses={self.misses}: must be 1 unanswered probe or more"
      )
    if self.link_s < self.late_s:
      raise ValueError(
        f"link_s={self.link_s}: must be late_s={self.late_s} or more, a link "
        "is judged only when a parcel is late"
      )


@dataclasses.dataclass(slots=True)
class _Look:
  """When to look next after an EW that owes something."""

  since: float  # its oldest parcel that is out
  at: float
  misses: int = 0


class Lookout:
  """Which EWs owe something, and what probes say of those that are late."""

  def __init__(self, limits: HealingLimits, transport: Transport) -> None:
    self._limits = limits
    self._transport = transport
    self._looks: dict[int, _Look] = {}

  def owes(self, rank: int, since: float) -> None:
    """A parcel is out; an older one is what counts."""
    if rank not in self._looks:
      self._looks[rank] = _Look(since, since + self._limits.late_s)

  def has_paid(self, rank: int, since: float | None) -> None:
    """A result is in: it is not dead, and owes `since` then (None: no more)."""
    self.forget(rank)
    if since is not None:
      self.owes(rank, since)

  def forget(self, rank: int) -> None:
    """What it owes is had elsewhere."""
    self._looks.pop(rank, None)

  def clear(self) -> None:
    """The run is over."""
    self._looks.clear()

  def look(self, now: float) -> "Found":
    """Probes whoever is late."""
    found = Found([], [])
    for rank, look in self._looks.items():
      if now < look.at:
        continue
      look.at = now + self._limits.late_s
      if not self._transport.answers(rank):
        look.misses += 1
        if look.misses >= self._limits.misses:
          found.dead.append(rank)
        continue
      look.misses = 0
      if now - look.since >= self._limits.link_s:
        found.silent.append((rank, now - look.since))
    return found


class Found(NamedTuple):
  """What a look has found."""

  dead: list[int]
  silent: list[tuple[int, float]]  # they answer, and owe for so many seconds
