"""Carries one action out: on the backend, and on the scheduler's state."""

import dataclasses
from collections.abc import Callable

import numpy as np

from resilient_moe.recovery.actions import (
  Action,
  FailRequests,
  RecomputePrefix,
  Requeue,
  RestartInstance,
  RestoreKV,
)
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.explain import explain
from resilient_moe.recovery.view import Status
from resilient_moe.serving.backend import Backend, Outcome, Placed
from resilient_moe.serving.state import (
  Current,
  SchedulerState,
  drop,
  place,
  unplace,
  with_ranks,
)

Record = Callable[..., None]  # report.Recorder.write


class EngineRestart(Exception):
  """The plan ends this engine: whoever hosts it starts a fresh one."""

  def __init__(self, action: RestartInstance, state: SchedulerState):
    super().__init__(explain(action))
    self.action = action
    self.state = state


def carry_out(
  action: Action, current: Current, backend: Backend, record: Record
) -> Outcome:
  """Does one action on the backend and on the scheduler's state.

  Steps that end while the backend is at it go into `current` as well; none of
  them has a request that is moved.
  """
  if isinstance(action, RestartInstance):
    raise EngineRestart(action, current.state)
  if isinstance(action, RestoreKV | RecomputePrefix):
    return _place(action, current, backend, record)
  if isinstance(action, Requeue):
    current.state = unplace(current.state, action.requests)
    _moved(record, "requeue", action.requests, ())
    return Outcome(f"{len(action.requests)} requests")
  if isinstance(action, FailRequests):
    for name in action.requests:
      record("failed", request_id=name, reason="rank lost")
    current.state = drop(current.state, action.requests)
    return Outcome(f"{len(action.requests)} requests")
  outcome = backend.execute(action, ())
  view = backend.view()
  lost = np.flatnonzero(view.status == Status.LOST)
  ranks = request_ranks(view)
  current.state = with_ranks(
    current.state, ranks, view.rows_per_rank, lost.tolist()
  )
  return outcome


def _place(
  action: RestoreKV | RecomputePrefix,
  current: Current,
  backend: Backend,
  record: Record,
) -> Outcome:
  """Requests into rows of their new ranks, with the KV that can be had."""
  before = {n: current.state.sequences[n] for n in action.requests}
  for name, rank in zip(action.requests, action.to, strict=True):
    current.state = place(current.state, name, rank, 0)
  after = {n: current.state.sequences[n] for n in action.requests}
  placed = tuple(
    Placed(
      n, before[n].rank, before[n].row, after[n].rank, after[n].row,
      before[n].computed,
    )
    for n in action.requests
  )  # fmt: skip
  outcome = backend.execute(action, placed)
  again = 0
  for name, s in after.items():
    held = min(outcome.restored.get(name, 0), s.known - 1)
    after[name] = dataclasses.replace(s, computed=held)
    again += s.known - 1 - held
  current.state = dataclasses.replace(
    current.state, sequences={**current.state.sequences, **after}
  )
  kind = "restore" if isinstance(action, RestoreKV) else "recompute"
  _moved(record, kind, action.requests, action.to, again, outcome.nbytes)
  return outcome


def _moved(
  record: Record, kind: str, names: tuple[str, ...], to: tuple[int, ...],
  tokens: int = 0, nbytes: int = 0,
) -> None:  # fmt: skip
  record(
    "requests_moved", kind=kind, request_ids=list(names), to=list(to),
    tokens=tokens, bytes=nbytes,
  )  # fmt: skip
