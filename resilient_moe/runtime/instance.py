"""What the backends of all runtimes share: facts, actions, ready meshes."""

import abc
import time
from typing import Any

import numpy as np

from resilient_moe.faults import Injector
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.model.step import pack, routing_arrays
from resilient_moe.recovery import Standing
from resilient_moe.recovery.actions import Action
from resilient_moe.recovery.view import ClusterView
from resilient_moe.runtime.execute import EXECUTE, Mesh
from resilient_moe.runtime.facts import Facts
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.serving.backend import Outcome, Placed
from resilient_moe.serving.recover import Record
from resilient_moe.serving.scheduler import StepBatch

WAIT_S = 0.02  # between two looks at the compiler


class Instance(abc.ABC):
  """Half of a `serving.backend.Backend`; a runtime adds steps and `Hands`."""

  def __init__(
    self,
    view: ClusterView,
    standing: Standing,
    readiness: Readiness,
    injector: Injector,
    record: Record,
  ) -> None:
    self.facts = Facts(view)
    self.standing = standing
    self.readiness = readiness
    self.injector = injector
    self.record = record
    self.canary_token = -1

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

  def view(self) -> ClusterView:
    return self.facts.view

  def execute(self, action: Action, placed: tuple[Placed, ...]) -> Outcome:
    epoch = self.facts.view.epoch
    outcome = EXECUTE[type(action)](self, action, placed)
    self.changed()
    if self.facts.view.epoch != epoch:
      self.announce()
    return outcome

  def ready_for(self, action: Action) -> bool:
    """Whether an action of a repair can be executed without a long wait."""
    del action
    return True

  def background_done(self) -> bool:
    return True

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
