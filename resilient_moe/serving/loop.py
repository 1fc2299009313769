"""The serve loop, written once for every backend (DESIGN 2.4)."""

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

from resilient_moe.recovery.policy import RecoveryPolicy
from resilient_moe.serving.backend import Backend, StepAborted
from resilient_moe.serving.recover import Record, Recovery
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import StepBatch, admit, complete, schedule
from resilient_moe.serving.state import (
  SchedulerState,
  accept,
  with_ranks,
)

IDLE_S = 0.002  # between two looks for requests when there is nothing to do


class Intake(Protocol):
  """Where requests come from."""

  def poll(self, step: int) -> list[tuple[Request, tuple[int, ...]]]:
    """Requests that have arrived by this step, with tokens emitted before."""

  def next_step(self) -> int | None:
    """The step of the next arrival that is known already."""

  def closed(self) -> bool:
    """Whether no further request can come."""


@dataclasses.dataclass
class Loop:
  """What one run of `serve` keeps between its steps."""

  recovery: Recovery
  state: SchedulerState
  number: int = 0  # of the next step
  retired: tuple[str, ...] = ()


def serve(
  intake: Intake,
  backend: Backend,
  policy: RecoveryPolicy,
  record: Record,
  *,
  chunk: int,
  first_step: int = 0,
  on_step: Callable[[int, float], None] | None = None,
) -> None:
  """Serves until every request is answered and repairs are done.

  Args:
    intake: requests enter here.
    backend: computes steps and executes actions.
    policy: asked on every failure.
    record: writes one event of the history.
    chunk: prompt tokens a rank prefills in one step.
    first_step: number of the first step (a restarted engine goes on).
    on_step: called with the step's number and seconds, for progress.

  Raises:
    EngineRestart: the plan ends this engine.
    Unrecoverable: no policy in line can recover.
  """
  view = backend.view()
  state = with_ranks(SchedulerState(), view.mesh, view.rows_per_rank)
  loop = Loop(Recovery(policy, backend, record), state, first_step)
  while True:
    _receive(loop, intake)
    _recover(loop)
    batch = _next_batch(loop, chunk)
    if batch is not None:
      seconds = _step(loop, batch)
      if on_step is not None and seconds is not None:
        on_step(batch.number, seconds)
    elif not _idle(loop, intake):
      return


def _receive(loop: Loop, intake: Intake) -> None:
  for request, tokens in intake.poll(loop.number):
    loop.state = accept(loop.state, request, tokens)


def _recover(loop: Loop) -> None:
  """Failures first; else one bite of the repair."""
  recovery = loop.recovery
  failures = recovery.backend.poll(repairing=recovery.repairing)
  if failures:
    loop.state = recovery.handle(loop.state, failures)
  elif recovery.repairing:
    loop.state = recovery.repair_step(loop.state)


def _next_batch(loop: Loop, chunk: int) -> StepBatch | None:
  loop.state, admitted = admit(loop.state)
  for name in admitted:
    s = loop.state.sequences[name]
    loop.recovery.record(
      "admitted", request_id=name, rank=s.rank, row=s.row, step=loop.number
    )
  view = loop.recovery.backend.view()
  batch = schedule(
    loop.state, number=loop.number, epoch=view.epoch, chunk=chunk,
    rows=view.rows_per_rank,
  )  # fmt: skip
  if batch is not None:
    batch = dataclasses.replace(batch, retired=loop.retired)
  return batch


def _step(loop: Loop, batch: StepBatch) -> float | None:
  """Runs one step; its seconds, or None if it didn't count."""
  record = loop.recovery.record
  start = time.monotonic()
  try:
    tokens = loop.recovery.backend.step(batch)
  except StepAborted:
    record("step_failed", step=batch.number, epoch=batch.epoch)
    return None
  loop.state, emissions, finished = complete(loop.state, batch, tokens)
  loop.number = batch.number + 1
  loop.retired = tuple(f.request_id for f in finished)
  seconds = time.monotonic() - start
  record(
    "step", step=batch.number, epoch=batch.epoch, bucket=batch.width,
    seconds=seconds, prefill_tokens=batch.prefill_tokens,
    emitted=[list(e) for e in emissions],
  )  # fmt: skip
  for f in finished:
    record(
      "finished", request_id=f.request_id, reason=f.reason, tokens=f.tokens
    )
  return seconds


def _idle(loop: Loop, intake: Intake) -> bool:
  """Nothing to compute: False where nothing is left at all."""
  if loop.recovery.repairing:
    if loop.recovery.waiting:
      time.sleep(IDLE_S)
    return True
  coming = intake.next_step()
  if coming is not None:
    loop.number = max(loop.number, coming)
    return True
  if intake.closed() and not loop.state.sequences:
    return not loop.recovery.backend.background_done()
  time.sleep(IDLE_S)
  return True
