"""What a detector reports. A policy sees failures, never faults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RanksLost:
  """These ranks and everything in their memory are gone."""

  ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RanksLeaving:
  """A warning: these ranks will be gone in `deadline_s` seconds.

  Until then they can be read from and serve on (preemption, maintenance).
  """

  ranks: tuple[int, ...]
  deadline_s: float


@dataclasses.dataclass(frozen=True)
class Straggler:
  """A rank that works, but `slowdown` times slower than its peers."""

  rank: int
  slowdown: float


@dataclasses.dataclass(frozen=True)
class LinkLost:
  """An attention rank can't reach an expert rank, while both live.

  `elsewhere`: whether it reaches another copy of what it wanted there, as it
  knows itself, other lost links considered; None: it doesn't say.
  """

  attention: int
  expert: int
  elsewhere: bool | None = None

  @property
  def ranks(self) -> tuple[int, ...]:
    return (self.attention, self.expert)


Failure = RanksLost | RanksLeaving | Straggler | LinkLost
