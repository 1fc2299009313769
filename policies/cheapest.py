"""Prices the plans of several policies and takes the cheapest.

Keeps standing: the reserve of all of them together (`first_feasible`).
Promises: what each of them promises; by default all are lossless.
The price is the seconds of `resume` on `hardware`, then those of `repair`
times `repair_weight`.
After: ours.
"""

import dataclasses

from resilient_moe.recovery import (
  THIS_MACHINE,
  ClusterView,
  Hardware,
  Plan,
  RecoveryPolicy,
  load,
  price_plan,
)
from resilient_moe.recovery import cheapest as cheapest_of

POLICIES = ("kv_restore", "replica_promotion", "mesh_shrink", "restart_cached")


def make(
  policies: tuple[str, ...] = POLICIES,
  hardware: Hardware = THIS_MACHINE,
  repair_weight: float = 0.01,
) -> RecoveryPolicy:
  """The cheapest of `policies` (names) on `hardware`."""

  def cost(plan: Plan, view: ClusterView) -> float:
    price = price_plan(plan, view, hardware)
    return price.resume.seconds + repair_weight * price.repair.seconds

  chooser = cheapest_of([load(name) for name in policies], cost)
  return dataclasses.replace(chooser, name="cheapest")
