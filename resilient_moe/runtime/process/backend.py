"""The process runtime: ranks are operating-system processes.

The supervisor runs the one scheduler and this backend; workers hold shards. A
step is sent to all members, counts once all have answered, and is committed
by a second message: what a rank computed in a step that somebody did not
finish is dropped.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from resilient_moe.faults import Fault, Injector
from resilient_moe.mesh.executables import Source
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.recovery import (
  ClusterView,
  Failure,
  RanksLeaving,
  RanksLost,
  Standing,
  Status,
  Straggler,
  absent,
  mesh_named,
)
from resilient_moe.recovery.actions import (
  Action,
  CopyExperts,
  FetchExecutable,
  Move,
  Rejoin,
)
from resilient_moe.recovery.reserve import Memory
from resilient_moe.recovery.view import Tier
from resilient_moe.runtime.execute import Mesh
from resilient_moe.runtime.instance import Instance, packed
from resilient_moe.runtime.process.crew import Crew
from resilient_moe.runtime.process.kv_copies import KVCopies
from resilient_moe.runtime.process.mate import RanksGone, WorkerFailed
from resilient_moe.runtime.process.signals import Signals
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.serving.backend import Outcome, Placed, StepAborted
from resilient_moe.serving.carry import Record
from resilient_moe.serving.scheduler import StepBatch

IN_RECOVERY_S = 0.005  # a fault in a recovery strikes within its next action
FIRST_STEP_S = 0.02  # what a step is taken to last before one was measured


class ProcessBackend(Instance):
  """Ranks in processes (`serving.backend.Backend`)."""

  def __init__(
    self,
    view: ClusterView,
    standing: Standing,
    shape: InstanceShape,
    crew: Crew,
    copies: KVCopies,
    launch: Callable[[int], int],
    readiness: Readiness,
    injector: Injector,
    signals: Signals,
    remember: Callable[[Injector], None],
    record: Record,
    now_s: Callable[[], float],
  ) -> None:
    super().__init__(view, standing, readiness, injector, record, now_s)
    self._shape = shape
    self.crew = crew
    self.kv = copies
    self._launch = launch
    self._signals = signals
    self._remember = remember
    self.parts: dict[int, tuple[float, float]] = {}  # of the last step, s:
    # without collectives, and in the program
    self._step_s = FIRST_STEP_S
    self._awaited: set[int] = set()  # killed, and not noticed yet
    self._told: Mesh = ()  # the mesh whose routing the workers have
    self.announce()

  @property
  def shape(self) -> InstanceShape:
    return self._shape

  # -- steps

  def step(self, batch: StepBatch) -> np.ndarray:
    mesh = self.facts.mesh
    self.kv.seats(batch)
    self._arm(self.due_in_step(batch, self._settled()), self._step_s)
    ints = packed(batch)
    start = time.monotonic()
    try:
      values = self._run(mesh, batch.width, ints)
    except RanksGone as gone:
      raise StepAborted from gone
    self._step_s = time.monotonic() - start
    segments = self.kv.segments(batch)
    self.crew.tell(
      {
        r: {"segments": segments.get(r, []), "retired": batch.retired}
        for r in mesh
      },
      "commit",
    )
    self.kv.committed(batch)
    self._watch_step(mesh, values)
    return np.concatenate([values[r][0] for r in mesh])

  def _run(self, mesh: Mesh, width: int, ints: np.ndarray) -> dict[int, Any]:
    self._tell_routing()
    calls = {
      r: {"mesh": mesh, "width": width, "ints": ints[i : i + 1]}
      for i, r in enumerate(mesh)
    }
    return self.crew.call(calls, "step").good()

  def _tell_routing(self) -> None:
    mesh = self.facts.mesh
    if self._told != mesh:
      routing = self.routing_of(self.facts.view.mesh)
      self.crew.tell({r: {"routing": routing} for r in mesh}, "routing")
      self._told = mesh

  def _watch_step(self, mesh: Mesh, values: dict[int, Any]) -> None:
    self.parts = {r: (values[r][1], values[r][2]) for r in mesh}
    watch = self.crew.watch
    watch.stepped(self._step_s, {r: values[r][1] for r in mesh})
    for rank, slowdown in watch.slow.reports():
      self.pending.append(Straggler(rank, slowdown))
    for rank in mesh:
      self.kv.heard(rank, *values[rank][3:])

  # -- failures

  def poll(
    self, recovery_actions: int | None = None, repairing: bool = False
  ) -> tuple[Failure, ...]:
    if recovery_actions is None:
      self.repairing = repairing
    self.crew.look()
    if recovery_actions is not None:
      faults = self.due_in_recovery(recovery_actions, ready=False)
      self._arm(faults, IN_RECOVERY_S)
    self._take_lost()
    if recovery_actions is None and not self.pending:
      self._in_peace()
    return self.take_pending()

  def _take_lost(self) -> None:
    self.kv.look()
    status = self.facts.view.status
    lost = [
      r for r in self.crew.take_lost() if status[r] != Status.LOST
    ]
    for rank in lost:
      self.readiness.drop_rank(rank)
    if lost:
      self.injector.add_lost(lost)
      self.kv.lost(lost)
      self._awaited.difference_update(lost)
      self.pending.append(RanksLost(tuple(sorted(lost))))

  def _settled(self) -> bool:
    """Nothing is under way behind traffic, and no kill is unnoticed."""
    quiet = self.readiness.done and not self.repairing
    return quiet and not self._awaited

  def _in_peace(self) -> None:
    """Background work, a bite at a time."""
    try:
      self.kv.rebase_one()
      self.make_ready()
    except RanksGone:
      self._take_lost()

  # -- faults

  def _arm(self, faults: list[Fault], within_s: float) -> None:
    if faults:
      self._remember(self.injector)
    for fault in faults:
      if fault.kind == "rank_leaving":
        self.struck(fault)
        deadline = float(fault.deadline_s or 0.0)
        self.pending.append(RanksLeaving(fault.ranks, deadline))
      else:
        if fault.kind == "rank_lost":
          self._awaited.update(r for r in fault.ranks if self.crew.alive(r))
        self._signals.arm(fault, within_s)

  def struck(self, fault: Fault) -> None:
    """Told right before a fault happens."""
    self.record_fault(fault, self.kv.sitting_on(fault.ranks))

  # -- actions

  def execute(self, action: Action, placed: tuple[Placed, ...]) -> Outcome:
    try:
      outcome = super().execute(action, placed)
    except RanksGone as gone:
      # `poll` reports it, and the rest of the plan is abandoned.
      outcome = Outcome(f"abandoned: {gone}")
    self.crew.epoch = self.facts.view.epoch
    return outcome

  def changed(self) -> None:
    self._told = ()
    self.kv.ring(self.facts.mesh)

  def ready_for(self, action: Action) -> bool:
    if isinstance(action, CopyExperts):
      return all(self._is_up(m.rank) for m in action.moves)
    view = self.facts.view
    if isinstance(action, Rejoin):
      if not self._is_up(action.rank):
        return False
      return self._made(absent(view.launched, [*self.facts.mesh, action.rank]))
    if isinstance(action, FetchExecutable):
      return self._made(action.absent)
    return True

  def _made(self, name: frozenset[int]) -> bool:
    """Whether a mesh is ready; if not, it will be, behind traffic."""
    view = self.facts.view
    mesh = mesh_named(view.launched, name).tolist()
    if name in view.ready or not all(self.crew.is_up(r) for r in mesh):
      return True  # or it is not for this action to wait for
    if not self.readiness.wants(name):
      self.readiness.want(view.launched, [name])
    return False

  def _is_up(self, rank: int) -> bool:
    return not self.crew.alive(rank) or self.crew.is_up(rank)

  def drop(self, ranks: Iterable[int]) -> None:
    for rank in ranks:
      self._awaited.discard(rank)
      if self.crew.alive(rank):
        self.crew.fence(rank)
        self.readiness.drop_rank(rank)
        self.kv.lost([rank])

  def load(self, mesh: Mesh, run: bool) -> Source:
    self.readiness.wait_compiled(len(mesh))
    said = self.crew.call({r: {"mesh": mesh} for r in mesh}, "load").good()
    if run:
      for width in self.shape.chunks():
        self.run_once(mesh, width)
    return max(map(Source, said.values()), key=list(Source).index)

  def run_once(self, mesh: Mesh, width: int) -> None:
    routing = self.routing_of(np.array(mesh, np.int32))
    call = {"mesh": mesh, "width": width, "routing": routing}
    self.crew.call(dict.fromkeys(mesh, call), "ready").good()

  def copy(
    self, moves: tuple[Move, ...], tier: Tier, slots: np.ndarray
  ) -> int:
    """Each rank pulls its own experts, all ranks side by side."""
    todo: dict[int, list[dict[str, Any]]] = {}
    for m in moves:
      source = None
      if tier in (Tier.PEER, Tier.LOCAL):
        up = self.crew.mate(m.source).up if self.crew.alive(m.source) else None
        if up is None:
          raise RanksGone((m.source,))
        slot = int(np.flatnonzero(slots[m.source] == m.expert)[0])
        source = (up.data, slot)
      todo.setdefault(m.rank, []).append(
        {"slot": m.slot, "expert": m.expert, "tier": str(tier),
         "source": source}
      )  # fmt: skip
    calls = {rank: {"fills": fills} for rank, fills in todo.items()}
    return sum(self._pulled(calls, "fill").values())

  def restore(
    self, placed: tuple[Placed, ...], tier: Tier
  ) -> tuple[dict[str, int], int]:
    return self.kv.restore(placed, tier, self.facts.view.alive())

  def _pulled(
    self, calls: Mapping[int, Mapping[str, Any]], op: str
  ) -> dict[int, Any]:
    """A call that reads from other processes, which may die meanwhile."""
    try:
      return self.crew.call(calls, op).good()
    except WorkerFailed:
      # Whoever it read from may be dead, or stuck: then it doesn't answer.
      self.crew.call({r: {} for r in self.crew.up_ranks()}, "done")
      self._take_lost()
      for failure in self.pending:
        if isinstance(failure, RanksLost):
          raise RanksGone(failure.ranks) from None
      raise

  def launch(self, rank: int) -> int:
    return self._launch(rank)

  def joined(self, rank: int) -> None:
    pass  # `changed` gives it its neighbours

  def rebase_after(self, placed: tuple[Placed, ...]) -> None:
    self.kv.moved(placed)

  def probe(self, ints: np.ndarray) -> np.ndarray:
    mesh = self.facts.mesh
    values = self._run(mesh, self.shape.options.chunk, ints)
    return np.concatenate([values[r][0] for r in mesh])

  def checkpoints(self) -> Mapping[str, tuple[int, int]]:
    return self.kv.records()

  def memory(self) -> Memory:
    """The host's copy of the experts counts in each process: it is a host."""
    view = self.facts.view
    mates = [self.crew.mate(r) for r in self.crew.ranks()]
    ups = [mate.up for mate in mates if mate.up is not None]
    rows = len(ups) * view.rows_per_rank
    if self.standing.checkpoint == "none":
      rows = 0
    return Memory(
      len(ups), ups[0].dense_bytes if ups else 0,
      sum(up.host_bytes for up in ups), rows * self.row_bytes,
    )  # fmt: skip

  def held_open(self) -> dict[str, int]:
    """Connections between workers that all meshes together keep open."""
    everybody: dict[int, dict] = {r: {} for r in self.crew.up_ranks()}
    ends = self.crew.call(everybody, "connections").good()
    return {"connections": sum(ends.values()) // 2}

  def close(self) -> None:
    """Ends every process; what the checkpoints came to is recorded."""
    self._signals.close()
    self.readiness.close()
    try:
      self.kv.close(self.facts.mesh)
    finally:
      self.crew.close()
      self.crew.watch.close()
