"""A policy decides: `prepare` before the failure, `recover` after it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from resilient_moe.recovery.failures import Failure
from resilient_moe.recovery.plan import Plan
from resilient_moe.recovery.view import ClusterView, RoutingTable


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
