"""What the benchmarks of the disaggregated deployment share.

Engines of either deployment that are driven a domain at a time, as the serve
loop does: nobody waits for another domain's step.
"""

import collections
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments import bench_models as models
from experiments.bench_engine import Engine
from experiments.bench_steps import Stopwatch
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.serving.scheduler import StepBatch, admit, complete
from resilient_moe.serving.state import SchedulerState, accept, with_ranks

WAIT_S = 0.002
# Nothing breaks here: who is late on a busy machine must not be taken for dead.
PATIENT = {"late_s": 2.0, "link_s": 20.0}
Ended = Callable[[StepBatch, float], None]  # (a step, its seconds)


class Driven(Engine):
  """An engine whose domains step side by side."""

  def decoding(self) -> SchedulerState:
    """The state in which everybody who has a row has begun to decode."""
    state = self.empty()
    for request in models.requests_of(self._model, self._model.seeds[0]):
      state = accept(state, request)
    widths: list[int] = []
    while not widths or any(widths):
      widths.clear()
      state, _ = admit(state)
      state = self._go(state, 1, lambda batch, _: widths.append(batch.width))
    return state

  def empty(self) -> SchedulerState:
    """Nobody is there."""
    view = self.backend.view()
    ranks = request_ranks(view)
    return with_ranks(SchedulerState(), ranks, view.rows_per_rank)

  def block(
    self, state: SchedulerState, count: int, ended: Ended | None = None
  ) -> tuple[float, int]:
    """Seconds and tokens of `count` decode steps of every domain."""
    start = time.perf_counter()
    emitted = self._go(state, count, ended or _nothing).emitted
    return time.perf_counter() - start, emitted - state.emitted

  def _go(
    self, state: SchedulerState, count: int, ended: Ended
  ) -> SchedulerState:
    left = dict.fromkeys(self.backend.domains(), count)
    began: dict[tuple[int, ...], float] = {}

    def begin(domain: tuple[int, ...]) -> None:
      began[domain] = time.perf_counter()
      self.backend.begin(self.batch(state, domain))

    for domain in left:
      begin(domain)
    while began:
      for batch, tokens in self.backend.finished(WAIT_S):
        if tokens is None:
          raise RuntimeError(f"step {batch.number} of {batch.mesh} failed")
        ended(batch, time.perf_counter() - began.pop(batch.mesh))
        state, _, _ = complete(state, batch, tokens)
        left[batch.mesh] -= 1
        if left[batch.mesh]:
          begin(batch.mesh)
    return state


class Inner(Stopwatch):
  """Seconds by label; what is called within another counts there only."""

  def __init__(self) -> None:
    super().__init__()
    self.calls: collections.Counter[str] = collections.Counter()
    self._within = [0.0]  # seconds of watched calls, by depth

  def timed(self, label: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
      self.calls[label] += 1
      self._within.append(0.0)
      start = time.perf_counter()
      try:
        return fn(*args, **kwargs)
      finally:
        whole = time.perf_counter() - start
        own = whole - self._within.pop()
        self._within[-1] += whole
        self.spent[label] = self.spent.get(label, 0.0) + own

    return call


def open_engine(
  name: str,
  model: models.Model,
  settings: models.Settings,
  workdir: pathlib.Path,
  *,
  attention: int,
  ranks: int,
  rows: int,
  processes: bool = False,
  policy: str = "none",
  exchange: Mapping[str, Any] | None = None,
  tag: str = "",
) -> Driven:
  """An engine of either deployment: `rows` on each rank that attends."""
  model = with_options(model, rows=rows)
  exchange = {**PATIENT, **(exchange or {})}
  tag = f"-{tag or 'engine'}-{attention}of{ranks}x{rows}"
  settings = dataclasses.replace(settings, ranks=ranks)
  return Driven(
    name, model, settings, workdir, policy, {}, ranks if processes else 0,
    attention, exchange, tag,
  )  # fmt: skip


def with_options(model: models.Model, **options: Any) -> models.Model:
  """The model with other step options."""
  return dataclasses.replace(model, options={**model.options, **options})


def same_rows(settings: models.Settings, model: models.Model) -> int:
  """Rows of all ranks together, the same in every deployment."""
  return settings.split.ranks * int(model.options["rows"])


def say(text: str) -> None:
  """A line of progress."""
  print(f"  {text}", flush=True)


def _nothing(batch: StepBatch, seconds: float) -> None:
  del batch, seconds
