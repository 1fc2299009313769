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
from resilient_moe.runtime.split import start as split_start
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
    attention: int = 0,
    exchange: Mapping[str, Any] | None = None,
    tag: str = "",
  ) -> None:
    """Starts it.

    Args:
      name: The model's.
      model: What it is, with its load.
      settings: The benchmarks'.
      workdir: Where random weights and what the engine writes go.
      policy: What is kept standing.
      kwargs: The policy's.
      ranks: On so many processes; 0: on the settings' emulated ranks.
      attention: Of the ranks, those that only attend; 0: collocated.
      exchange: Fields of `ExchangeOptions`.
      tag: Tells engines of one model and policy apart.
    """
    folder = models.folder_of(name, model, workdir)
    case = Case(
      str(folder), policy, dict(kwargs), "bench", model.seeds[0],
      "process" if ranks else "emulated",
      "disaggregated" if attention else "collocated",
      ranks or settings.ranks, dict(model.options), (), (), wait_ready=False,
      attention=attention, exchange=exchange or {},
    )  # fmt: skip
    fresh = assemble.Fresh()
    self.plans = assemble.plan_instance(case, fresh)
    self.scratch = workdir / "scratch" / f"{name}-{policy}{tag}"
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
      build = split_start.assemble if attention else assemble.assemble
      self.backend = build(
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

  def batch(
    self, state: SchedulerState, mesh: tuple[int, ...] | None = None
  ) -> StepBatch:
    """The next step from a state; each has a number of its own.

    `mesh`: of these ranks; None: of all that have requests.
    """
    view = self.backend.view()
    self.number += 1
    batch = schedule(
      state, number=self.number, epoch=view.epoch, chunk=self.chunk,
      rows=view.rows_per_rank, mesh=mesh,
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
