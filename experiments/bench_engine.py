"""An engine in this process, driven step by step from a state that it keeps.

A step reads the cache and commits a delta, so running the same steps again
from the same state does the same work: blocks with and without a feature are
comparable, and can be interleaved.
"""

import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments import bench_models as models
from resilient_moe.runtime import assemble
from resilient_moe.runtime.case import Case
from resilient_moe.runtime.channel import ChannelRecorder
from resilient_moe.runtime.process import supervise
from resilient_moe.serving.scheduler import (
  StepBatch,
  admit,
  complete,
  schedule,
)
from resilient_moe.serving.state import SchedulerState, accept, with_ranks

# Several benchmarks use the same engine: it takes long to build.
POLICY = "kv_restore"
_OPEN: dict[str, "Engine"] = {}


def shared(
  name: str, model: models.Model, settings: models.Settings,
  workdir: pathlib.Path,
) -> "Engine":  # fmt: skip
  """The model's engine with everything on but the ready meshes."""
  if name not in _OPEN:
    kwargs = {"ready": "none"}
    _OPEN[name] = Engine(name, model, settings, workdir, POLICY, kwargs)
  return _OPEN[name]


def close_all() -> None:
  """Closes the shared engines."""
  while _OPEN:
    _OPEN.popitem()[1].close()


class Engine:
  """A backend and the scheduler's state, without the gateway."""

  def __init__(
    self,
    name: str,
    model: models.Model,
    settings: models.Settings,
    workdir: pathlib.Path,
    policy: str,
    kwargs: Mapping[str, Any],
    ranks: int = 0,
  ) -> None:
    """`ranks`: on so many processes; 0: on the settings' emulated ranks."""
    folder = models.folder_of(name, model, workdir)
    case = Case(
      str(folder), policy, dict(kwargs), "bench", model.seeds[0],
      "process" if ranks else "emulated", "collocated",
      ranks or settings.ranks, dict(model.options), (), (), wait_ready=False,
    )  # fmt: skip
    fresh = assemble.Fresh()
    self.plans = assemble.plan_instance(case, fresh)
    self.scratch = workdir / "scratch" / f"{name}-{policy}"
    shutil.rmtree(self.scratch, ignore_errors=True)
    self.scratch.mkdir(parents=True)
    self.recorder = ChannelRecorder(lambda line: None, time.monotonic())
    self.backend: Any
    if ranks:
      self.backend = supervise.assemble(
        case, self.plans, fresh, self.scratch, self.recorder
      )
    else:
      devices = models.devices(settings.ranks + self.plans.policy.spares)
      self.backend = assemble.assemble(
        case, self.plans, fresh, devices, self.scratch, self.recorder
      )
    self.number = 0
    self._model = model
    self.chunk = self.plans.shape.options.chunk

  def close(self) -> None:
    """Frees the devices' memory and what the engine wrote."""
    self.backend.close()
    shutil.rmtree(self.scratch, ignore_errors=True)

  def decoding(self) -> SchedulerState:
    """The state in which every request of the load has begun to decode."""
    view = self.backend.view()
    state = with_ranks(SchedulerState(), view.mesh, view.rows_per_rank)
    for request in models.requests_of(self._model, self._model.seeds[0]):
      state = accept(state, request)
    while True:
      state, _ = admit(state)
      batch = self.batch(state)
      if batch.width == 0:
        return state
      state, _, _ = complete(state, batch, self.backend.step(batch))

  def batch(self, state: SchedulerState) -> StepBatch:
    """The next step from a state; each has a number of its own."""
    view = self.backend.view()
    self.number += 1
    batch = schedule(
      state, number=self.number, epoch=view.epoch, chunk=self.chunk,
      rows=view.rows_per_rank,
    )  # fmt: skip
    assert batch is not None
    return batch

  def step(
    self, state: SchedulerState, between: Callable[[], object]
  ) -> tuple[float, SchedulerState]:
    """Seconds of one decode step with `between` before it; the state after."""
    start = time.perf_counter()
    between()
    batch = self.batch(state)
    tokens = self.backend.step(batch)
    state, _, _ = complete(state, batch, tokens)
    assert batch.width == 0
    return time.perf_counter() - start, state

  def steps(
    self,
    state: SchedulerState,
    count: int,
    between: Callable[[], object] = lambda: None,
  ) -> list[float]:
    """Seconds of each of `count` steps."""
    found = []
    for _ in range(count):
      seconds, state = self.step(state, between)
      found.append(seconds)
    return found
