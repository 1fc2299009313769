"""The serve loop, written once for every backend (DESIGN 2.4)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.policy import RecoveryPolicy
from resilient_moe.serving.backend import Backend
from resilient_moe.serving.carry import Record
from resilient_moe.serving.clock import REAL_CLOCK, Clock
from resilient_moe.serving.recover import Recovery
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import StepBatch, admit, complete, schedule
from resilient_moe.serving.state import (
  Current,
  SchedulerState,
  accept,
  with_ranks,
)

Domain = tuple[int, ...]  # ranks that step together
WAIT_S = 0.002  # for a step to end, between two looks at everything else
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
  current: Current
  clock: Clock
  number: int = 0  # of the next step
  retired: dict[Domain, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )  # by domain: who has ended since its last step
  running: dict[Domain, "Running"] = dataclasses.field(default_factory=dict)

  @property
  def state(self) -> SchedulerState:
    return self.current.state

  @state.setter
  def state(self, state: SchedulerState) -> None:
    self.current.state = state

  def take_retired(self, domain: Domain) -> tuple[str, ...]:
    """Who has ended there, or in a domain that is no more."""
    known = set(self.recovery.backend.domains()) - {domain}
    ended = [d for d in self.retired if d not in known]
    return tuple(n for d in ended for n in self.retired.pop(d))

  def in_step(self) -> frozenset[str]:
    """Requests of the steps under way."""
    return frozenset(n for r in self.running.values() for n in r.requests)


class Running(NamedTuple):
  """A step that is under way."""

  batch: StepBatch
  began_s: float  # on the loop's clock

  @property
  def requests(self) -> list[str]:
    rows, chunks = self.batch.rows, self.batch.chunks
    return [r.request_id for r in rows] + [c.request_id for c in chunks]


def serve(
  intake: Intake,
  backend: Backend,
  policy: RecoveryPolicy,
  record: Record,
  *,
  chunk: int,
  first_step: int = 0,
  on_step: Callable[[int, float], None] | None = None,
  clock: Clock = REAL_CLOCK,
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
    clock: what seconds are measured on.

  Raises:
    EngineRestart: the plan ends this engine.
    Unrecoverable: no policy in line can recover.
  """
  view = backend.view()
  ranks = request_ranks(view)
  state = with_ranks(SchedulerState(), ranks, view.rows_per_rank)
  current = Current(state)
  recovery = Recovery(policy, backend, record, current, clock)
  loop = Loop(recovery, current, clock, first_step)

  def meanwhile() -> None:
    _finish(loop, on_step, 0.0)
    _begin(loop, chunk)

  backend.call_meanwhile(meanwhile)
  recovery.rehearse()
  while True:
    _receive(loop, intake)
    recovery.look()
    recovery.turn(loop.in_step())
    _begin(loop, chunk)
    if loop.running:
      busy = recovery.resuming or recovery.pending
      _finish(loop, on_step, 0.0 if busy else WAIT_S)
    elif not loop.recovery.resuming and not _idle(loop, intake):
      return


def _receive(loop: Loop, intake: Intake) -> None:
  for request, tokens in intake.poll(loop.number):
    loop.state = accept(loop.state, request, tokens)


def _begin(loop: Loop, chunk: int) -> None:
  """Starts a step in every domain that has none, and something to do."""
  recovery, backend = loop.recovery, loop.recovery.backend
  view = backend.view()
  if recovery.resuming and not view.disaggregated:
    return  # one mesh: nobody can step while it is rebuilt
  if not recovery.resuming:
    _admit(loop)
  held = recovery.held()
  receiving = recovery.receiving(loop.in_step())
  for domain in backend.domains():
    if domain in loop.running or receiving & set(domain):
      continue
    batch = schedule(
      loop.state, number=loop.number, epoch=view.epoch, chunk=chunk,
      rows=view.rows_per_rank, mesh=domain, held=held,
    )  # fmt: skip
    if batch is not None:
      batch = dataclasses.replace(batch, retired=loop.take_retired(domain))
      loop.number += 1
      loop.running[domain] = Running(batch, loop.clock.now())
      backend.begin(batch)


def _admit(loop: Loop) -> None:
  loop.state, admitted = admit(loop.state)
  for name in admitted:
    s = loop.state.sequences[name]
    loop.recovery.record(
      "admitted", request_id=name, rank=s.rank, row=s.row, step=loop.number
    )


def _finish(
  loop: Loop, on_step: Callable[[int, float], None] | None, wait_s: float
) -> None:
  """Takes in what steps have come to; waits so long for the first."""
  for batch, tokens in loop.recovery.backend.finished(wait_s):
    running = loop.running.pop(batch.mesh)
    if tokens is None:
      _failed(loop, batch)
      continue
    seconds = loop.clock.now() - running.began_s
    _complete(loop, batch, tokens, seconds)
    if on_step is not None:
      on_step(batch.number, seconds)


def _failed(loop: Loop, batch: StepBatch) -> None:
  """Nothing of it counts: it is as if it had never been begun."""
  loop.recovery.record("step_failed", step=batch.number, epoch=batch.epoch)
  loop.retired[batch.mesh] = batch.retired
  if batch.number + 1 == loop.number:  # none has the next number yet
    loop.number = batch.number


def _complete(
  loop: Loop, batch: StepBatch, tokens: np.ndarray, seconds: float
) -> None:
  """A step counts: its tokens leave.

  It counts in the present epoch: a domain whose ranks have all stayed may
  finish what it began before somebody else left.
  """
  record = loop.recovery.record
  loop.state, emissions, finished = complete(loop.state, batch, tokens)
  loop.retired[batch.mesh] = tuple(f.request_id for f in finished)
  view = loop.recovery.backend.view()
  apart = {"domain": list(batch.mesh)} if view.disaggregated else {}
  record(
    "step", step=batch.number, epoch=view.epoch, bucket=batch.width,
    seconds=seconds, prefill_tokens=batch.prefill_tokens,
    emitted=[list(e) for e in emissions], **apart,
  )  # fmt: skip
  for f in finished:
    record(
      "finished", request_id=f.request_id, reason=f.reason, tokens=f.tokens
    )


def _idle(loop: Loop, intake: Intake) -> bool:
  """Nothing to compute: False where nothing is left at all."""
  if loop.recovery.repairing:
    if loop.recovery.waiting:
      loop.clock.sleep(IDLE_S)
    return True
  coming = intake.next_step()
  if coming is not None:
    loop.number = max(loop.number, coming)
    return True
  if intake.closed() and not loop.state.sequences:
    return not loop.recovery.backend.background_done()
  loop.clock.sleep(IDLE_S)
  return True
