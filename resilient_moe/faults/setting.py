"""What a scenario is made for, and what a table of scenarios holds."""

import dataclasses
from collections.abc import Callable

from resilient_moe.faults.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a scenario is made for."""

  ranks: int
  seed: int
  at_step: int
  rank: int  # the first to be struck

  def after(self, distance: int) -> int:
    """The rank `distance` places further round the ring."""
    return (self.rank + distance) % self.ranks


@dataclasses.dataclass(frozen=True)
class Scenario:
  """A named recipe for a schedule; the docstring of `make` describes it."""

  make: Callable[[Setting], Schedule]
  tags: frozenset[str]
  min_ranks: int  # so that the ranks struck differ and one survives

  @property
  def about(self) -> str:
    """What happens, in a sentence."""
    return _first_line(self.make)


@dataclasses.dataclass(frozen=True)
class SplitSetting:
  """What a scenario of a disaggregated deployment is made for."""

  ranks: int
  attention: int  # ranks 0 to attention - 1; the others are expert ranks
  seed: int
  at_step: int
  aw: int  # the first attention rank to be struck
  ew: int  # the first expert rank to be struck
  rank: int | None  # who was asked to be struck first; None: drawn

  @property
  def experts(self) -> int:
    """How many expert ranks there are."""
    return self.ranks - self.attention

  def aw_after(self, distance: int) -> int:
    """The attention rank `distance` places further round their ring."""
    return (self.aw + distance) % self.attention

  def ew_after(self, distance: int) -> int:
    """The expert rank `distance` places further round their ring."""
    place = self.ew - self.attention + distance
    return self.attention + place % self.experts


@dataclasses.dataclass(frozen=True)
class SplitScenario:
  """A `Scenario` that knows who does what."""

  make: Callable[[SplitSetting], Schedule]
  tags: frozenset[str]
  first: str  # whom it strikes first: "attention", "experts" or "any"
  # So that the ranks struck differ and one of each role survives.
  min_attention: int
  min_experts: int

  @property
  def about(self) -> str:
    """What happens, in a sentence."""
    return _first_line(self.make)


def _first_line(make: Callable[..., Schedule]) -> str:
  return (make.__doc__ or "").strip().split("\n")[0]
