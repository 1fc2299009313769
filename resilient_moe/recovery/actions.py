"""The primitive actions of a plan, as data.

Each action says what it reads and writes, as names of resources; the order in
a plan is derived from that (`plan.py`). Four interpreters give it meaning:
`semantics.advance` (what the world is afterwards: the definition), `price`
(seconds and bytes on given hardware), `explain` (one line), and a backend's
`execute` (does it, on real arrays). A new action needs an entry in each; the
contract tests run over `ACTIONS`.

Resources: `epoch`, `process`, `role` (who may hold experts), `seats` (who may
hold requests), `mesh`, `executable`, `slots`, `table`, `mask`, `kv`, `queue`,
`service` (that a canary can be served).
"""

import dataclasses
from typing import ClassVar

from resilient_moe.recovery.view import Role, RoutingTable, Tier

Resources = frozenset[str]


def _names(*names: str) -> Resources:
  return frozenset(names)


@dataclasses.dataclass(frozen=True)
class Action:
  """Base of all actions: which resources it reads and writes."""

  reads: ClassVar[Resources] = _names()
  writes: ClassVar[Resources] = _names()


@dataclasses.dataclass(frozen=True)
class Fence(Action):
  """Bump the epoch; refuse what `ranks` still send; never read them again."""

  ranks: tuple[int, ...]
  writes: ClassVar[Resources] = _names("epoch")


@dataclasses.dataclass(frozen=True)
class RebuildMesh(Action):
  """`ranks`, in this order, become the mesh (spares among them serve)."""

  ranks: tuple[int, ...]
  reads: ClassVar[Resources] = _names("epoch", "process", "role")
  writes: ClassVar[Resources] = _names("mesh")


@dataclasses.dataclass(frozen=True)
class FetchExecutable(Action):
  """Get the step programs of a mesh: warm, else from the store, else compile.

  `absent` names the mesh (`view.absent`). The outcome says which it was.
  """

  absent: frozenset[int]
  reads: ClassVar[Resources] = _names("mesh")
  writes: ClassVar[Resources] = _names("executable")


@dataclasses.dataclass(frozen=True)
class Move:
  """Bytes of `expert` into a slot; `source` is a rank for the peer tier."""

  expert: int
  rank: int
  slot: int
  source: int = -1


@dataclasses.dataclass(frozen=True)
class CopyExperts(Action):
  """Weights into slots, all from one tier. The slots serve nothing yet."""

  moves: tuple[Move, ...]
  tier: Tier
  reads: ClassVar[Resources] = _names("epoch", "process", "role")
  writes: ClassVar[Resources] = _names("slots")


@dataclasses.dataclass(frozen=True)
class RemapExperts(Action):
  """Swap the routing table, and unmask what it serves.

  Promotion of a replica or shadow is this, with no copy before it.
  """

  table: RoutingTable
  reads: ClassVar[Resources] = _names("slots", "mesh")
  writes: ClassVar[Resources] = _names("table", "mask")


@dataclasses.dataclass(frozen=True)
class MaskExperts(Action):
  """Hide experts from the gate: their logits become -inf. Lossy."""

  experts: tuple[int, ...]
  reads: ClassVar[Resources] = _names("epoch")
  writes: ClassVar[Resources] = _names("mask")


@dataclasses.dataclass(frozen=True)
class RestoreKV(Action):
  """Requests go on at ranks `to` from checkpointed KV (or a live peer's).

  `tier` PEER with the request's own rank still alive is a hand-over of live
  KV; else the checkpoint is read where it lies (peer or host).
  """

  requests: tuple[str, ...]
  to: tuple[int, ...]
  tier: Tier
  reads: ClassVar[Resources] = _names("epoch", "mesh", "seats")
  writes: ClassVar[Resources] = _names("kv")


@dataclasses.dataclass(frozen=True)
class RecomputePrefix(Action):
  """Requests go on at ranks `to` by prefill over prompt + tokens so far."""

  requests: tuple[str, ...]
  to: tuple[int, ...]
  reads: ClassVar[Resources] = _names("epoch", "mesh", "seats")
  writes: ClassVar[Resources] = _names("kv")


@dataclasses.dataclass(frozen=True)
class Requeue(Action):
  """Back to the queue, tokens kept; re-prefilled when a row is free."""

  requests: tuple[str, ...]
  reads: ClassVar[Resources] = _names("epoch")
  writes: ClassVar[Resources] = _names("queue")


@dataclasses.dataclass(frozen=True)
class FailRequests(Action):
  """End requests with an error; the client may send them again (EEP)."""

  requests: tuple[str, ...]
  reads: ClassVar[Resources] = _names("epoch")
  writes: ClassVar[Resources] = _names("queue")


@dataclasses.dataclass(frozen=True)
class SwitchRole(Action):
  """An attention rank becomes an expert rank, or back.

  Requests on it are handed over before they can go on; its KV is readable
  until then. Experts that it held are gone when it attends.
  """

  rank: int
  role: Role

  @property
  def reads(self) -> Resources:  # type: ignore[override]  # by direction
    """Who attends again first has its experts read and routed elsewhere."""
    if self.role == Role.ATTENTION:
      return _names("epoch", "slots", "table")
    return _names("epoch")

  @property
  def writes(self) -> Resources:  # type: ignore[override]
    """Copies wait for their rank, requests for one that attends."""
    return _names("seats" if self.role == Role.ATTENTION else "role")


@dataclasses.dataclass(frozen=True)
class LaunchRank(Action):
  """Start a replacement for `rank` in the background."""

  rank: int
  reads: ClassVar[Resources] = _names("epoch")
  writes: ClassVar[Resources] = _names("process")


@dataclasses.dataclass(frozen=True)
class Rejoin(Action):
  """Bring a launched rank back into the mesh, with a short pause."""

  rank: int
  reads: ClassVar[Resources] = _names("epoch", "process", "slots")
  writes: ClassVar[Resources] = _names("mesh", "executable")


@dataclasses.dataclass(frozen=True)
class RestartInstance(Action):
  """The baseline: the engine's process ends and a fresh one serves on.

  Weights from disk, executables compiled (`cache=False`) or loaded from the
  store (`cache=True`), every request prefilled again.
  """

  ranks: tuple[int, ...]  # who serves afterwards
  cache: bool
  reads: ClassVar[Resources] = _names("epoch")
  writes: ClassVar[Resources] = _names(
    "process", "mesh", "executable", "slots", "table", "mask", "kv", "queue"
  )


@dataclasses.dataclass(frozen=True)
class Verify(Action):
  """A canary step must give known token ids before traffic goes on."""

  probe: str = "canary"
  reads: ClassVar[Resources] = _names(
    "mesh", "executable", "slots", "table", "mask"
  )
  writes: ClassVar[Resources] = _names("service")


ACTIONS: tuple[type[Action], ...] = (
  Fence,
  RebuildMesh,
  FetchExecutable,
  CopyExperts,
  RemapExperts,
  MaskExperts,
  RestoreKV,
  RecomputePrefix,
  Requeue,
  FailRequests,
  SwitchRole,
  LaunchRank,
  Rejoin,
  RestartInstance,
  Verify,
)
