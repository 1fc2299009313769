"""Carries a plan out: one action after the other, on any backend.

A failure on the way abandons the rest and asks the policy again with the view
as it then is (DESIGN 4: a plan is never resumed, only replaced).
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Collection, Iterable

import numpy as np

from resilient_moe.recovery.actions import (
  Action,
  CopyExperts,
  FailRequests,
  RecomputePrefix,
  Requeue,
  RestartInstance,
  RestoreKV,
)
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.explain import explain
from resilient_moe.recovery.failures import Failure, RanksLost
from resilient_moe.recovery.plan import Plan, ordered
from resilient_moe.recovery.policy import (
  Infeasible,
  RecoveryPolicy,
  recover_checked,
)
from resilient_moe.recovery.view import ClusterView, Status
from resilient_moe.serving.backend import Backend, Outcome, Placed
from resilient_moe.serving.state import (
  SchedulerState,
  drop,
  place,
  request_table,
  unplace,
  with_ranks,
)

Record = Callable[..., None]  # report.Recorder.write


class Unrecoverable(Exception):
  """No policy in line can recover; the run ends with its reason."""


class EngineRestart(Exception):
  """The plan ends this engine: whoever hosts it starts a fresh one."""

  def __init__(self, action: RestartInstance, state: SchedulerState):
    super().__init__(explain(action))
    self.action = action
    self.state = state


@dataclasses.dataclass
class Recovery:
  """The recovery side of a serve loop: what is left to do, a bite at a time.

  `resume` goes first and holds the requests that the plan pauses; `repair`
  goes on behind traffic.
  """

  policy: RecoveryPolicy
  backend: Backend
  record: Record
  pending: collections.deque[Failure] = dataclasses.field(
    default_factory=collections.deque
  )
  plan: Plan | None = None  # that is being resumed
  resume: collections.deque[Action] = dataclasses.field(
    default_factory=collections.deque
  )
  done: int = 0  # actions of `resume`
  repair: collections.deque[Action] = dataclasses.field(
    default_factory=collections.deque
  )
  repairing: bool = False
  waiting: bool = False  # for what the next action of the repair needs

  @property
  def resuming(self) -> bool:
    return self.plan is not None

  def held(self) -> frozenset[str]:
    """Requests that wait for the rest of `resume`, or to be moved."""
    paused = frozenset(self.plan.paused) if self.plan else frozenset()
    return paused | self._moving()

  def _moving(self) -> frozenset[str]:
    """Requests of the next action: none of them may be in a step."""
    parts = self.resume if self.resuming else self.repair
    return frozenset(getattr(parts[0], "requests", ()) if parts else ())

  def view(self, state: SchedulerState) -> ClusterView:
    """The world as a policy sees it."""
    table = request_table(state, self.backend.checkpoints())
    return dataclasses.replace(self.backend.view(), requests=table)

  def look(self) -> None:
    """Asks for failures; they replace what is being done."""
    failures = self.backend.poll(
      self.done if self.resuming else None, self.repairing
    )
    if failures:
      self.pending.extend(failures)
      self.plan, self.resume = None, collections.deque()

  def turn(
    self, state: SchedulerState, in_step: Collection[str]
  ) -> SchedulerState:
    """One bite: a plan, an action of it, or one of the repair.

    `in_step`: requests of steps that are under way; they aren't moved.
    """
    while self.pending and not self.resuming:
      self._plan_for(state, _merge(self.pending))
    if self._moving() & set(in_step):
      return state
    if self.resuming:
      return self._resume(state)
    return self.repair_step(state) if self.repairing else state

  def _plan_for(self, state: SchedulerState, failure: Failure) -> None:
    self._report(failure)
    plan = self._ask(state, failure)
    if plan is not None:
      self.plan, self.done = plan, 0
      self.resume = collections.deque(ordered(plan.resume))
      self.repair = collections.deque(_fine(ordered(plan.repair)))
      self.repairing = True

  def _resume(self, state: SchedulerState) -> SchedulerState:
    """The next action; or, behind the last, that service goes on."""
    if self.resume:
      self.done += 1
      return self._carry_out("resume", self.resume.popleft(), state)
    assert self.plan is not None
    epoch = self.backend.view().epoch
    self.record("resumed", epoch=epoch, paused=list(self.plan.paused))
    self.plan = None
    return state

  def repair_step(self, state: SchedulerState) -> SchedulerState:
    """One action of the repair, behind traffic, if it can be done at once."""
    if self.repair:
      self.waiting = not self.backend.ready_for(self.repair[0])
      if self.waiting:
        return state
      state = self._carry_out("repair", self.repair.popleft(), state)
    if self.repairing and not self.repair:
      self.repairing = False
      self.record("redundancy", full=True, epoch=self.backend.view().epoch)
    return state

  def _report(self, failure: Failure) -> None:
    named = getattr(failure, "ranks", None) or (failure.rank,)  # type: ignore
    self.record(
      "failure", kind=type(failure).__name__, ranks=list(named),
      epoch=self.backend.view().epoch,
    )  # fmt: skip

  def _ask(self, state: SchedulerState, failure: Failure) -> Plan | None:
    start = time.monotonic()
    view = self.view(state)
    plan = recover_checked(self.policy, view, failure)
    name = self.policy.name
    if isinstance(plan, Infeasible):
      self.record("infeasible", policy=name, reason=plan.reason)
      if isinstance(failure, RanksLost):
        raise Unrecoverable(
          f"policy {name!r} can't recover from the loss of rank(s) "
          f"{list(failure.ranks)}: {plan.reason}"
        )
      return None
    self.record(
      "plan", policy=name, epoch=view.epoch, paused=list(plan.paused),
      resume=[explain(a) for a in ordered(plan.resume)],
      repair=[explain(a) for a in ordered(plan.repair)],
      seconds=time.monotonic() - start,
    )  # fmt: skip
    return plan

  def _carry_out(
    self, part: str, action: Action, state: SchedulerState
  ) -> SchedulerState:
    start = time.monotonic()
    state, outcome = carry_out(action, state, self.backend, self.record)
    self.record(
      "action", part=part, name=type(action).__name__,
      explain=explain(action), seconds=time.monotonic() - start,
      bytes=outcome.nbytes, tier=outcome.tier, outcome=outcome.detail,
    )  # fmt: skip
    return state


def carry_out(
  action: Action, state: SchedulerState, backend: Backend, record: Record
) -> tuple[SchedulerState, Outcome]:
  """Does one action on the backend and on the scheduler's state."""
  if isinstance(action, RestartInstance):
    raise EngineRestart(action, state)
  if isinstance(action, RestoreKV | RecomputePrefix):
    return _place(action, state, backend, record)
  if isinstance(action, Requeue):
    state = unplace(state, action.requests)
    _moved(record, "requeue", action.requests, 0, 0)
    return state, Outcome(f"{len(action.requests)} requests")
  if isinstance(action, FailRequests):
    for name in action.requests:
      record("failed", request_id=name, reason="rank lost")
    state = drop(state, action.requests)
    return state, Outcome(f"{len(action.requests)} requests")
  outcome = backend.execute(action, ())
  view = backend.view()
  lost = np.flatnonzero(view.status == Status.LOST)
  ranks = request_ranks(view)
  state = with_ranks(state, ranks, view.rows_per_rank, lost.tolist())
  return state, outcome


def _place(
  action: RestoreKV | RecomputePrefix,
  state: SchedulerState,
  backend: Backend,
  record: Record,
) -> tuple[SchedulerState, Outcome]:
  """Requests into rows of their new ranks, with the KV that can be had."""
  before = {n: state.sequences[n] for n in action.requests}
  for name, rank in zip(action.requests, action.to, strict=True):
    state = place(state, name, rank, 0)
  placed = tuple(
    Placed(
      n, before[n].rank, before[n].row, state.sequences[n].rank,
      state.sequences[n].row, before[n].computed,
    )
    for n in action.requests
  )  # fmt: skip
  outcome = backend.execute(action, placed)
  sequences = dict(state.sequences)
  for name in action.requests:
    held = min(outcome.restored.get(name, 0), sequences[name].known - 1)
    sequences[name] = dataclasses.replace(sequences[name], computed=held)
  state = dataclasses.replace(state, sequences=sequences)
  again = sum(
    sequences[n].known - 1 - sequences[n].computed for n in action.requests
  )
  kind = "restore" if isinstance(action, RestoreKV) else "recompute"
  _moved(record, kind, action.requests, again, outcome.nbytes)
  return state, outcome


def _moved(
  record: Record, kind: str, names: tuple[str, ...], tokens: int, nbytes: int
) -> None:
  record(
    "requests_moved", kind=kind, request_ids=list(names), tokens=tokens,
    bytes=nbytes,
  )  # fmt: skip


def _merge(pending: collections.deque[Failure]) -> Failure:
  """The next failure; losses reported together are one failure."""
  lost = [f for f in pending if isinstance(f, RanksLost)]
  if not lost:
    return pending.popleft()
  for failure in lost:
    pending.remove(failure)
  return RanksLost(tuple(sorted({r for f in lost for r in f.ranks})))


def _fine(actions: tuple[Action, ...]) -> Iterable[Action]:
  """Repairs in small bites, so that no step waits for a long copy."""
  for action in actions:
    if isinstance(action, CopyExperts):
      for move in action.moves:
        yield CopyExperts((move,), action.tier)
    else:
      yield action
