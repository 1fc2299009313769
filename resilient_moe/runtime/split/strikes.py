"""Faults that wait for their place inside a step of attention ranks."""

import dataclasses
import random
from collections.abc import Callable

from resilient_moe.faults import Fault

PATIENCE = 4  # rounds of steps, after which a fault strikes between two


@dataclasses.dataclass
class _Armed:
  fault: Fault
  place: str
  layer: int
  steps: int = 0


class Strikes:
  """Which armed fault strikes where; the places are `inline.Hook`'s.

  An attention rank is struck in its own step, an expert rank in the step of
  whoever has sent it a parcel. What finds no such moment (the rank is idle)
  strikes between two steps.
  """

  def __init__(
    self, seed: int, layers: int, attends: Callable[[int], bool],
    strike: Callable[[Fault], None],
  ) -> None:  # fmt: skip
    self._random = random.Random(f"inside/{seed}")
    self._layers = layers
    self._attends = attends
    self._strike = strike
    self._armed: list[_Armed] = []
    self.prefills: set[int] = set()  # ranks whose step under way does

  @property
  def waiting(self) -> bool:
    """Whether a fault waits for its place."""
    return bool(self._armed)

  def arm(self, fault: Fault) -> None:
    """Lets a fault strike inside one of the next steps."""
    expert = not any(map(self._attends, fault.ranks))
    places = ("exchange", "experts") if expert else ("attention", "exchange")
    place = fault.inside or self._random.choice(places)
    layer = self._random.randrange(self._layers)
    self._armed.append(_Armed(fault, place, layer))

  def reached(self, stepping: int, place: str, rank: int, layer: int) -> None:
    """A step of rank `stepping` is at a place: strikes what waits for it."""
    for armed in list(self._armed):
      victims = set(armed.fault.ranks)
      mine = {v for v in victims if self._attends(v)}
      here = stepping in mine if mine else rank in victims
      if place == "attention":
        here = rank in victims
      phase = "prefill" if stepping in self.prefills else "decode"
      here &= armed.fault.phase in ("any", phase)
      if armed.place == place and armed.layer == layer and here:
        self._armed.remove(armed)
        self._strike(armed.fault)

  def between(self) -> None:
    """Between two steps: strikes what has waited for too long."""
    for armed in list(self._armed):
      armed.steps += 1
      if armed.steps > PATIENCE:
        self._armed.remove(armed)
        self._strike(armed.fault)
