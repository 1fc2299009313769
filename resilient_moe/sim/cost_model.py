"""What a simulated backend, and the fleet study, ask of a cost model.

`Costs` says how long things take and how many bytes they move; it owns no
clock and no state, so that one object serves all seeds and processes. All
times are seconds of virtual time. `sim/cost.py: Roofline` implements it from
a device and a model's shape; calibration puts fitted numbers behind the same
questions by replacing a device's figures (`hardware.replace`).
"""

import dataclasses
from typing import Protocol

import numpy as np

from resilient_moe.recovery.actions import Action
from resilient_moe.recovery.price import Cost, Hardware
from resilient_moe.recovery.view import ClusterView


@dataclasses.dataclass(frozen=True)
class StepLoad:
  """What one step of a domain computes, by place in `ranks` (mesh order)."""

  ranks: np.ndarray  # [D] int64 the attending ranks that step together
  rows: np.ndarray  # [D] decode rows that are active
  context: np.ndarray  # [D] positions that those rows attend to, summed
  chunk: np.ndarray  # [D] prompt tokens of the rank's chunk
  chunk_context: np.ndarray  # [D] positions attended to, summed over its tokens
  others: float = 0.0  # tokens that other domains send to the same experts
  # while this one steps (where attention and experts are apart)

  @property
  def tokens(self) -> float:
    """All tokens of the step."""
    return float(self.rows.sum() + self.chunk.sum())


@dataclasses.dataclass(frozen=True)
class DecodeLine:
  """Decode step time while the active rows stay the same: a line.

  `step_s = base_s + slope_s * c`, where `c` is the busiest rank's context
  (positions, summed over its rows). A step adds one position a row, so n steps
  from context c take
  `n * (base_s + slope_s * (c + rows * (n - 1) / 2))`: load advances in closed
  form between events.
  """

  base_s: float
  slope_s: float  # seconds a position of the busiest rank

  def step_s(self, context: float) -> float:
    """One step at `context` positions on the busiest rank."""
    return self.base_s + self.slope_s * context

  def steps_s(self, steps: float, context: float, rows: float) -> float:
    """`steps` decode steps from `context`, `rows` on the busiest rank."""
    middle = context + rows * (steps - 1) / 2
    return steps * (self.base_s + self.slope_s * middle)

  def steps_in(self, seconds: float, context: float, rows: float) -> float:
    """How many decode steps fit in `seconds` (a real number): the inverse."""
    a = self.slope_s * rows / 2
    b = self.base_s + self.slope_s * (context - rows / 2)
    if a <= 0:
      return seconds / b
    # 2c / (b + sqrt(.)) has no cancellation when a is small.
    return 2 * seconds / (b + float(np.sqrt(b * b + 4 * a * seconds)))


class Costs(Protocol):
  """Seconds and bytes of steps and actions on some hardware."""

  def hardware(self, view: ClusterView) -> Hardware:
    """What `recovery.price_plan` prices plans with, from the same numbers.

    Depends on the view: its step and prefill rate, one node or several.
    """

  def step_s(self, view: ClusterView, load: StepLoad) -> float:
    """One step of a domain: decode rows and prompt chunks together."""

  def decode_line(
    self, view: ClusterView, rows: np.ndarray, ranks: np.ndarray | None = None
  ) -> DecodeLine:
    """Decode-only steps with `rows` [D] active on `ranks` (default: all).

    `ranks` are those of one domain that attend, in mesh order.
    """

  def price(self, action: Action, view: ClusterView) -> Cost:
    """An action carried out from `view`: wall-clock seconds, bytes moved.

    A `RecomputePrefix` is charged its whole prefill here; a backend that
    steps through the chunks itself must not add it again.
    """

  def prefill_part_s(self, action: Action, view: ClusterView) -> float:
    """Of these seconds, those in which requests are prefilled again."""
