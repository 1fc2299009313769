"""A policy decides: `prepare` before the failure, `recover` after it.

`load` finds policies by name; `combine` makes policies of policies.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable
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


def misplaced(
  name: str, deployments: tuple[str, ...], view: ClusterView
) -> str | None:
  """Why a policy for `deployments` can't be used on this view, else None."""
  here = DEPLOYMENTS[int(view.disaggregated)]
  if here in deployments:
    return None
  meant = " or ".join(deployments) or "no"
  return f"policy {name!r} is for {meant} deployments, not {here}"


def recover_checked(
  policy: RecoveryPolicy, view: ClusterView, failure: Failure
) -> Plan | Infeasible:
  """What the policy says; an illegal plan is an error before any execution.

  Raises:
    IllegalPlan: names the action, the value and the limit.
  """
  reason = misplaced(policy.name, policy.deployments, view)
  plan = Infeasible(reason) if reason else policy.recover(view, failure)
  if isinstance(plan, Infeasible):
    return plan
  check(
    plan,
    view,
    lossy=not policy.lossless,
    fails_requests=policy.fails_requests,
  )
  return plan


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
