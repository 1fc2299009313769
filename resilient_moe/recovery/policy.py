"""A policy decides: `prepare` before the failure, `recover` after it.

Combinators (`first_feasible`, `cheapest`) make policies of policies; `load`
finds them by name.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from resilient_moe.recovery.failures import Failure
from resilient_moe.recovery.plan import Plan, check
from resilient_moe.recovery.view import ClusterView, RoutingTable

DEPLOYMENTS = ("collocated", "disaggregated")


@dataclasses.dataclass(frozen=True)
class Infeasible:
  """A policy's answer when it can't recover; the next in line is asked."""

  reason: str


@dataclasses.dataclass(frozen=True)
class Standing:
  """What a policy keeps standing in peacetime; all of it is charged to it.

  Shapes are fixed for an instance: `slots` and `rows_per_rank` reserve what
  the promised losses need.
  """

  slots: np.ndarray  # [N, S] int32 expert in each slot at the start; -1: empty
  table: RoutingTable  # who serves at the start (shadows are left out)
  rows_per_rank: int  # KV rows reserved on each rank
  ready: tuple[frozenset[int], ...] = ()  # meshes to make ready, by absence
  checkpoint: str = "none"  # KV checkpointing: none, peer or host
  host_weights: bool = False  # keep the experts' weights in host memory
  store_executables: bool = False  # keep compiled programs on disk


Prepare = Callable[[ClusterView], Standing]
Recover = Callable[[ClusterView, Failure], Plan | Infeasible]


@dataclasses.dataclass(frozen=True)
class RecoveryPolicy:
  """`prepare` and `recover`, and what the pair promises."""

  name: str
  prepare: Prepare
  recover: Recover
  lossless: bool = True  # every finished request has its fault-free tokens
  fails_requests: bool = False  # may end requests for the client to retry
  spares: int = 0  # devices kept beside the mesh
  deployments: tuple[str, ...] = DEPLOYMENTS  # where it can be used


def recover_checked(
  policy: RecoveryPolicy, view: ClusterView, failure: Failure
) -> Plan | Infeasible:
  """What the policy says; an illegal plan is an error before any execution.

  Raises:
    IllegalPlan: names the action, the value and the limit.
  """
  plan = policy.recover(view, failure)
  if isinstance(plan, Infeasible):
    return plan
  check(
    plan,
    view,
    lossy=not policy.lossless,
    fails_requests=policy.fails_requests,
  )
  return plan


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
  policies: Sequence[RecoveryPolicy], name: str, recover: Recover
) -> RecoveryPolicy:
  if not policies:
    raise ValueError(f"{name} of 0 policies; give at least 1")

  def prepare(view: ClusterView) -> Standing:
    return functools.reduce(_wider, (p.prepare(view) for p in policies))

  return RecoveryPolicy(
    name=name,
    prepare=prepare,
    recover=recover,
    lossless=all(p.lossless for p in policies),
    fails_requests=any(p.fails_requests for p in policies),
    spares=max(p.spares for p in policies),
    deployments=tuple(
      d for d in DEPLOYMENTS if any(d in p.deployments for p in policies)
    ),
  )


def first_feasible(
  *policies: RecoveryPolicy, name: str = ""
) -> RecoveryPolicy:
  """Asks the policies in turn; the first plan is taken.

  It stands as the first policy does, with the largest reserve (slots, rows,
  copies, spares) of all, the ready meshes of all, and their host memory, KV
  checkpointing and stored executables where any of them needs it.
  """

  def recover(view: ClusterView, failure: Failure) -> Plan | Infeasible:
    reasons = []
    for policy in policies:
      plan = policy.recover(view, failure)
      if isinstance(plan, Plan):
        return plan
      reasons.append(f"{policy.name}: {plan.reason}")
    return Infeasible("; ".join(reasons))

  joined = name or "+".join(p.name for p in policies)
  return _union(policies, joined, recover)


def cheapest(
  policies: Sequence[RecoveryPolicy],
  cost: Callable[[Plan, ClusterView], float],
) -> RecoveryPolicy:
  """Asks all policies; the plan that costs least is taken, ties in order.

  It stands as `first_feasible` of the same policies does.
  """

  def recover(view: ClusterView, failure: Failure) -> Plan | Infeasible:
    plans, reasons = [], []
    for policy in policies:
      plan = policy.recover(view, failure)
      if isinstance(plan, Plan):
        plans.append(plan)
      else:
        reasons.append(f"{policy.name}: {plan.reason}")
    if not plans:
      return Infeasible("; ".join(reasons))
    return min(plans, key=lambda plan: cost(plan, view))

  names = ",".join(p.name for p in policies)
  return _union(policies, f"cheapest({names})", recover)


def policy_names() -> list[str]:
  """The files of `policies/`, sorted."""
  folder = importlib.import_module("policies")  # plug-ins: found, not known
  names = (m.name for m in pkgutil.iter_modules(folder.__path__))
  return sorted(n for n in names if not n.startswith("_"))


def load(name: str, **kwargs: Any) -> RecoveryPolicy:
  """The policy `name`, made with `kwargs`.

  `name` is a file of `policies/` (`mesh_shrink`), a module that has `make`
  (`my_package.my_policy`), or something in a module (`my_module.my_policy`):
  a function that makes a policy, or a policy.

  Raises:
    ValueError: unknown name or keyword; names the value and the choices.
  """
  found = _find(name)
  if isinstance(found, RecoveryPolicy):
    if kwargs:
      raise ValueError(f"{name} is a policy already; it takes no {kwargs}")
    return found
  try:
    inspect.signature(found).bind(**kwargs)
  except TypeError as error:
    choices = ", ".join(inspect.signature(found).parameters) or "none"
    raise ValueError(
      f"policy {name!r}: {error}; keywords: {choices}"
    ) from error
  policy = found(**kwargs)
  if not isinstance(policy, RecoveryPolicy):
    raise ValueError(f"{name} made a {type(policy).__name__}, not a policy")
  return policy


def _find(name: str) -> Any:
  """What `name` stands for: a policy, or a function that makes one."""
  if name in policy_names():
    return importlib.import_module(f"policies.{name}").make
  parent, _, last = name.rpartition(".")
  for path, attribute in ((name, "make"), (parent, last)):
    module = _module(path) if "." in name or attribute == "make" else None
    if module is not None and hasattr(module, attribute):
      return getattr(module, attribute)
  raise ValueError(
    f"unknown policy {name!r}; choices: {', '.join(policy_names())}, "
    "or a dotted path to a module with `make`, to a function or to a policy"
  )


def _module(path: str) -> types.ModuleType | None:
  """The module at `path`; None if there is none of that name."""
  if not path or not all(part.isidentifier() for part in path.split(".")):
    return None
  try:
    return importlib.import_module(path)
  except ModuleNotFoundError as error:
    if error.name and (path == error.name or path.startswith(error.name + ".")):
      return None
    raise
