"""Numbers that papers publish, beside the same ones composed here.

A row says which numbers of the paper went in (`inputs`), what else was taken
for granted (`assumes`), and how the number comes about. Its kind:

  by construction  follows from its inputs by addition, or is one of them: it
                   shows that the plan has the paper's stages, no more
  predicted        comes from other cases, other ranks or hardware: it may
                   miss, and says by how much

Constants are read off one case and used in the others (`inputs` names that
case); none is tuned to the number beside which it stands. The plans are those
of the real policies, from real views of the papers' sizes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from resilient_moe.recovery import (
  ClusterView,
  Failure,
  IllegalPlan,
  Infeasible,
  Plan,
  RanksLost,
  RecoveryPolicy,
  lose,
  recover_checked,
)
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.hardware import Device, Figure, replace

CONSTRUCTED, PREDICTED = "by construction", "predicted"
TARGET = 0.25  # relative error that a predicted row should stay within


@dataclasses.dataclass(frozen=True)
class Row:
  """One published number and its simulated counterpart."""

  system: str
  case: str
  unit: str
  published: float
  simulated: float
  kind: str
  inputs: str  # numbers of the paper that went in; "-": none
  assumes: str = "-"  # what nobody states
  note: str = ""

  def __post_init__(self) -> None:
    if self.kind not in (CONSTRUCTED, PREDICTED):
      raise ValueError(
        f"kind={self.kind!r}; choices: {CONSTRUCTED}, {PREDICTED}"
      )

  @property
  def name(self) -> str:
    return f"{self.system}: {self.case}"

  @property
  def error(self) -> float:
    """Relative: 0.1 is 10% above what was published."""
    return self.simulated / self.published - 1

  @property
  def hit(self) -> bool:
    """Whether it is within the target."""
    return abs(self.error) <= TARGET


class Planned(NamedTuple):
  """What a policy does about a loss, from the view it was asked with."""

  view: ClusterView
  plan: Plan


def plan_for(
  policy: RecoveryPolicy, view: ClusterView, failure: Failure
) -> Planned:
  """The checked plan of `policy` on `view`.

  Raises:
    IllegalPlan: the policy has none, though a paper's case needs one.
  """
  left = lose(view, failure.ranks) if isinstance(failure, RanksLost) else view
  plan = recover_checked(policy, left, failure)
  if isinstance(plan, Infeasible):
    raise IllegalPlan(f"policy {policy.name!r}: {plan.reason}")
  return Planned(left, plan)


def resume_s(model: Roofline, planned: Planned) -> float:
  """Seconds until the paused requests go on."""
  return model.price_plan(planned.plan, planned.view).resume.seconds


def by_action(model: Roofline, planned: Planned) -> dict[str, float]:
  """Seconds of the plan's `resume` by name of action."""
  price = model.price_plan(planned.plan, planned.view)
  found: dict[str, float] = {}
  for action, cost in price.by_action[: len(planned.plan.resume)]:
    name = type(action).__name__
    found[name] = found.get(name, 0.0) + cost.seconds
  return found


def from_case(device: Device, case: str, **numbers: float) -> Device:
  """The device with constants read off a named case of a paper."""
  return replace(device, **{k: Figure(v, case) for k, v in numbers.items()})


def summary(rows: list[Row]) -> Mapping[str, float]:
  """How many are predicted, how many of them hit, and their errors."""
  errors = sorted(abs(r.error) for r in rows if r.kind == PREDICTED)
  middle = len(errors) // 2
  return {
    "rows": len(rows),
    "predicted": len(errors),
    "within_target": sum(r.hit for r in rows if r.kind == PREDICTED),
    "median_abs_error": (errors[middle] + errors[~middle]) / 2,
    "max_abs_error": errors[-1],
  }


Composer = Callable[..., list[Row]]
