"""What the backends of all runtimes share: facts, faults, ready meshes."""

import abc
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from resilient_moe.faults import Fault, Injector, Moment
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.model.step import pack, routing_arrays
from resilient_moe.recovery import Failure, Role, Standing
from resilient_moe.recovery.actions import Action
from resilient_moe.recovery.reserve import Memory, reserve_bytes
from resilient_moe.recovery.view import ClusterView
from resilient_moe.runtime.execute import EXECUTE, Mesh
from resilient_moe.runtime.facts import Facts
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.serving.backend import Outcome, Placed, Stepwise
from resilient_moe.serving.carry import Record
from resilient_moe.serving.scheduler import StepBatch

if TYPE_CHECKING:
  from resilient_moe.runtime.assemble import Plans

WAIT_S = 0.02  # between two looks at the compiler
# Faults that hit requests: whoever sits there loses its KV, or waits.
HURTS = ("rank_lost", "rank_leaving", "rank_stuck")


class Instance(Stepwise, abc.ABC):
  """Half of a `serving.backend.Backend`; a runtime adds steps and `Hands`."""

  def __init__(
    self,
    view: ClusterView,
    standing: Standing,
    readiness: Readiness,
    injector: Injector,
    record: Record,
    now_s: Callable[[], float],
  ) -> None:
    self.facts = Facts(view)
    self.standing = standing
    self.readiness = readiness
    self.injector = injector
    self.record = record
    self.now_s = now_s
    self.canary_token = -1
    self.pending: list[Failure] = []  # detected, not reported yet
    self.repairing = False  # a recovery or a repair is under way
    self._moment = Moment(step=0, t_s=0.0, emitted_tokens=0)

  @property
  @abc.abstractmethod
  def shape(self) -> InstanceShape:
    """What every program of the instance is compiled for."""

  @abc.abstractmethod
  def run_once(self, mesh: Mesh, width: int) -> None:
    """Makes a mesh's program ready: loads it and runs it on idle rows."""

  @abc.abstractmethod
  def changed(self) -> None:
    """An action was executed: what was derived from the facts is old."""

  @abc.abstractmethod
  def memory(self) -> Memory:
    """What is held now."""

  def held_open(self) -> dict[str, int]:
    """What ready meshes keep beside memory, by its name in the history."""
    return {}

  def redundancy_bytes(self, plans: "Plans") -> int:
    """Memory beyond the same instance's without recovery."""
    return reserve_bytes(
      plans.view, self.memory(), plans.base_rows, self.row_bytes
    )

  @property
  def row_bytes(self) -> int:
    """Of one request's KV."""
    return self.facts.view.token_kv_bytes * self.shape.options.cache_len

  def view(self) -> ClusterView:
    return self.facts.view

  def domains(self) -> tuple[Mesh, ...]:
    return (self.facts.mesh,)

  def execute(self, action: Action, placed: tuple[Placed, ...]) -> Outcome:
    epoch = self.facts.view.epoch
    outcome = EXECUTE[type(action)](self, action, placed)
    self.changed()
    if self.facts.view.epoch != epoch:
      self.announce()
    return outcome

  def switch(self, rank: int, role: Role) -> None:
    """The rank gets what its new role needs; only where roles are apart."""
    raise ValueError(f"rank {rank} can't become {role.name} on this runtime")

  def ready_for(self, action: Action) -> bool:
    """Whether an action of a repair can be executed without a long wait."""
    del action
    return True

  def background_done(self) -> bool:
    return True

  # -- faults and failures

  def due_in_step(self, batch: StepBatch, ready: bool) -> list[Fault]:
    """Faults whose time is this step; `ready`: nothing else is under way."""
    self._moment = Moment(
      step=batch.number, t_s=self.now_s(), emitted_tokens=batch.emitted,
      in_prefill=bool(batch.chunks), ready=ready,
    )  # fmt: skip
    return self.injector.poll(self._moment)

  def due_in_recovery(self, actions: int, ready: bool) -> list[Fault]:
    """Faults whose time is after so many actions of a recovery."""
    self._moment = dataclasses.replace(
      self._moment, t_s=self.now_s(), in_prefill=False,
      recovery_actions=actions, ready=ready,
    )  # fmt: skip
    return self.injector.poll(self._moment)

  def record_fault(self, fault: Fault, sitting: list[str]) -> None:
    """Ground truth for the history; `sitting`: who sits on its ranks."""
    moment = self._moment
    phase = "prefill" if moment.in_prefill else "decode"
    if moment.recovery_actions is not None:
      phase = "recovery"
    self.record(
      "fault", kind=fault.kind, ranks=list(fault.ranks),
      affected=sitting if fault.kind in HURTS else [], phase=phase,
      step=moment.step,
    )  # fmt: skip

  def take_pending(self) -> tuple[Failure, ...]:
    """The failures to report."""
    failures, self.pending = tuple(self.pending), []
    # A recovery begins: until a poll says otherwise, something is repaired.
    self.repairing |= bool(failures)
    return failures

  # -- meshes

  def announce(self) -> None:
    """Writes the membership into the history."""
    view = self.facts.view
    self.record("epoch", epoch=view.epoch, mesh=list(self.facts.mesh))

  def routing_of(self, mesh: np.ndarray) -> Any:
    """The routing arrays for a mesh; other ranks' entries are left out."""
    view = self.facts.view
    entries = view.table.entries
    outside = ~np.isin(entries[:, :, 0], mesh)
    entries = np.where(outside[:, :, None], -1, entries)
    # The step takes the first `copies` columns: live ones in front.
    order = np.argsort(entries[:, :, 0] < 0, axis=1, kind="stable")
    entries = np.take_along_axis(entries, order[:, :, None], axis=1)
    return routing_arrays(entries, mesh, view.slots_per_rank, view.masked)

  def make_ready(self) -> None:
    """One bite of the background work on ready meshes."""
    name = self.readiness.step(self.run_once)
    if name is None:
      return
    self.facts.ready(name, False)
    if self.standing.store_executables:
      self.facts.stored(name)

  def wait_ready(self) -> None:
    """Blocks until every mesh that the policy wants is ready."""
    while not self.readiness.done:
      self.make_ready()
      if not self.readiness.working:
        time.sleep(WAIT_S)


def packed(batch: StepBatch) -> np.ndarray:
  """A batch as the step's one int32 array."""
  return pack(
    batch.decode, batch.decode_temperature, batch.chunk, batch.chunk_fields,
    batch.chunk_temperature,
  )  # fmt: skip
