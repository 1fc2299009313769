"""Policies of policies: the first that has a plan, or the cheapest plan."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from resilient_moe.recovery.failures import Failure
from resilient_moe.recovery.plan import Plan
from resilient_moe.recovery.policy import (
  DEPLOYMENTS,
  Infeasible,
  Recover,
  RecoveryPolicy,
  Standing,
  misplaced,
)
from resilient_moe.recovery.view import ClusterView, RoutingTable


def _wider(first: Standing, second: Standing) -> Standing:
  """`first` with the reserve enlarged so that `second` can take over."""
  width = max(first.slots.shape[1], second.slots.shape[1])
  slots = np.full((first.slots.shape[0], width), -1, np.int32)
  slots[:, : first.slots.shape[1]] = first.slots
  slots.setflags(write=False)
  mine, other = first.table.entries, second.table.entries
  copies = max(mine.shape[1], other.shape[1])
  entries = np.full((mine.shape[0], copies, 2), -1, np.int32)
  entries[:, : mine.shape[1]] = mine
  entries.setflags(write=False)
  streams = first.checkpoint != "none"
  return Standing(
    slots=slots,
    table=RoutingTable(entries),
    rows_per_rank=max(first.rows_per_rank, second.rows_per_rank),
    ready=tuple(dict.fromkeys(first.ready + second.ready)),
    checkpoint=first.checkpoint if streams else second.checkpoint,
    host_weights=first.host_weights or second.host_weights,
    store_executables=first.store_executables or second.store_executables,
  )


def _union(
  policies: Sequence[RecoveryPolicy],
  name: str,
  recover: Recover,
  deployments: tuple[str, ...],
) -> RecoveryPolicy:
  def prepare(view: ClusterView) -> Standing:
    reason = misplaced(name, deployments, view)
    if reason:
      raise ValueError(reason)
    members, _ = _usable(policies, view)
    return functools.reduce(_wider, (p.prepare(view) for p in members))

  return RecoveryPolicy(
    name=name,
    prepare=prepare,
    recover=recover,
    lossless=all(p.lossless for p in policies),
    fails_requests=any(p.fails_requests for p in policies),
    spares=max(p.spares for p in policies),
    deployments=deployments,
  )


def _usable(
  policies: Sequence[RecoveryPolicy], view: ClusterView
) -> tuple[list[RecoveryPolicy], list[str]]:
  """Those of `policies` that are for this deployment; why not the others."""
  reasons = [misplaced(p.name, p.deployments, view) for p in policies]
  pairs = zip(policies, reasons, strict=True)
  return [p for p, why in pairs if not why], [why for why in reasons if why]


def first_feasible(
  *policies: RecoveryPolicy, name: str = ""
) -> RecoveryPolicy:
  """Asks the policies in turn; the first plan is taken.

  It stands as the first policy does and can be used where that can, with the
  largest reserve (slots, rows, copies, spares) of all, the ready meshes of
  all, and their host memory, KV checkpointing and stored executables where
  any of them needs it. Who is for another deployment is left out.
  """
  _some(policies, "first_feasible")

  def recover(view: ClusterView, failure: Failure) -> Plan | Infeasible:
    members, reasons = _usable(policies, view)
    for policy in members:
      plan = policy.recover(view, failure)
      if isinstance(plan, Plan):
        return plan
      reasons.append(f"{policy.name}: {plan.reason}")
    return Infeasible("; ".join(reasons))

  joined = name or "+".join(p.name for p in policies)
  return _union(policies, joined, recover, policies[0].deployments)


def cheapest(
  policies: Sequence[RecoveryPolicy],
  cost: Callable[[Plan, ClusterView], float],
) -> RecoveryPolicy:
  """Asks all policies; the plan that costs least is taken, ties in order.

  It stands as `first_feasible` does of those that are for the deployment.
  """
  _some(policies, "cheapest")

  def recover(view: ClusterView, failure: Failure) -> Plan | Infeasible:
    members, reasons = _usable(policies, view)
    plans = []
    for policy in members:
      plan = policy.recover(view, failure)
      if isinstance(plan, Plan):
        plans.append(plan)
      else:
        reasons.append(f"{policy.name}: {plan.reason}")
    if not plans:
      return Infeasible("; ".join(reasons))
    return min(plans, key=lambda plan: cost(plan, view))

  names = ",".join(p.name for p in policies)
  anywhere = tuple(
    d for d in DEPLOYMENTS if any(d in p.deployments for p in policies)
  )
  return _union(policies, f"cheapest({names})", recover, anywhere)


def _some(policies: Sequence[RecoveryPolicy], name: str) -> None:
  if not policies:
    raise ValueError(f"{name} of 0 policies; give at least 1")
