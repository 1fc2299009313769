"""Everything that defines one run, as plain data (no JAX)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from resilient_moe.faults import PROCESS_KINDS, Fault, check_roles
from resilient_moe.recovery import (
  DEPLOYMENTS,
  RecoveryPolicy,
  first_feasible,
  load,
)
from resilient_moe.serving.request import Request

RUNTIMES = ("emulated", "logical", "process", "simulated")


class RunFailed(RuntimeError):
  """The engine failed, or no policy in line could recover."""


@dataclasses.dataclass(frozen=True)
class Case:
  """One policy, one scenario, one seed, on one runtime."""

  checkpoint: str  # folder of the model
  policy: str  # name or dotted path; "a+b": b takes over where a can't
  policy_kwargs: Mapping[str, Any]  # of the first policy
  scenario: str
  seed: int
  runtime: str
  deployment: str
  ranks: int
  options: Mapping[str, Any]  # fields of model.StepOptions
  requests: tuple[Request, ...]
  faults: tuple[Fault, ...]
  wait_ready: bool = True  # hold traffic until the ready meshes are ready
  detector: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # fields of `process.rules.Limits`
  cluster: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # fields of `process.cluster.Cluster`
  attention: int = 0  # ranks that do attention only; 0: all do everything
  exchange: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # fields of `split.options.ExchangeOptions`
  sim: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # fields of `experiments.simulated.SimOptions`
  dtype: str = ""  # of the weights; "": as the checkpoint says

  def __post_init__(self) -> None:
    for name, choices in (("runtime", RUNTIMES), ("deployment", DEPLOYMENTS)):
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(
          f"{name}={value!r}: choose one of {', '.join(choices)}"
        )
    for fault in self.faults:
      if fault.kind in PROCESS_KINDS and self.runtime != "process":
        raise ValueError(
          f"fault {fault.kind!r} needs processes; it can't happen on "
          f"runtime={self.runtime!r}, only on runtime='process'"
        )
    if self.ranks < 1:
      raise ValueError(f"ranks={self.ranks}: at least 1")
    self._check_deployment()

  def _check_deployment(self) -> None:
    apart = self.deployment == "disaggregated"
    least, most = (1, self.ranks - 1) if apart else (0, 0)
    if not least <= self.attention <= most:
      raise ValueError(
        f"attention={self.attention} of {self.ranks} ranks: {least} to {most} "
        f"where the deployment is {self.deployment}"
      )
    if apart and self.runtime == "logical":
      raise ValueError(
        "runtime='logical' is one program for all ranks; disaggregated runs "
        "on: emulated, process, simulated"
      )
    if self.attention:
      check_roles(self.faults, self.attention, self.ranks)


def make_policy(case: Case) -> RecoveryPolicy:
  """The policy of a case; "a+b" asks b where a says Infeasible."""
  first, *rest = case.policy.split("+")
  policy = load(first, **dict(case.policy_kwargs))
  if rest:
    policy = first_feasible(policy, *(load(name) for name in rest))
  if case.deployment not in policy.deployments:
    raise ValueError(
      f"policy {case.policy!r} is for deployment "
      f"{' or '.join(policy.deployments)}, not {case.deployment}"
    )
  return policy
