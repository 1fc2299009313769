"""Carries a plan out: one action after the other, on any backend.

A failure on the way abandons the rest and asks the policy again with the view
as it then is (DESIGN 4: a plan is never resumed, only replaced).
"""

import collections
import dataclasses
from collections.abc import Collection, Iterable

from resilient_moe.recovery import links
from resilient_moe.recovery.actions import Action, CopyExperts, RestoreKV
from resilient_moe.recovery.explain import explain
from resilient_moe.recovery.failures import Failure, LinkLost, RanksLost
from resilient_moe.recovery.plan import Plan, ordered
from resilient_moe.recovery.policy import (
  Infeasible,
  RecoveryPolicy,
  recover_checked,
)
from resilient_moe.recovery.semantics import lose
from resilient_moe.recovery.view import ClusterView
from resilient_moe.serving.backend import Backend
from resilient_moe.serving.carry import Record, carry_out
from resilient_moe.serving.clock import REAL_CLOCK, Clock
from resilient_moe.serving.state import Current, request_table

LINK_TRIES = 10  # reports of a link that nobody can do without, or replace


class Unrecoverable(Exception):
  """No policy in line can recover; the run ends with its reason."""


@dataclasses.dataclass
class Recovery:
  """The recovery side of a serve loop: what is left to do, a bite at a time.

  `resume` goes first and holds the requests that the plan pauses; `repair`
  goes on behind traffic.
  """

  policy: RecoveryPolicy
  backend: Backend
  record: Record
  current: Current
  clock: Clock = REAL_CLOCK
  pending: collections.deque[Failure] = dataclasses.field(
    default_factory=collections.deque
  )
  unheard: bool = False  # `pending` has news for the plan at hand
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
  at_hand: Action | None = None  # that is being carried out
  in_vain: collections.Counter[Failure] = dataclasses.field(
    default_factory=collections.Counter
  )  # what stops requests, and no plan was found for, and how often

  @property
  def resuming(self) -> bool:
    return self.plan is not None

  def held(self) -> frozenset[str]:
    """Requests that wait for the rest of `resume`, or to be moved."""
    paused = frozenset(self.plan.paused) if self.plan else frozenset()
    return paused | self._moving()

  def _moving(self) -> frozenset[str]:
    """Requests of the next action: none of them may be in a step."""
    return frozenset(getattr(self._next(), "requests", ()))

  def _next(self) -> Action | None:
    """The action that is being carried out, or will be next."""
    parts = self.resume if self.resuming else self.repair
    return self.at_hand or (parts[0] if parts else None)

  def receiving(self, in_step: Collection[str]) -> frozenset[int]:
    """Ranks that KV is written to now, or as soon as the loop turns.

    A step begun there would wait behind it, and go without the requests that
    come with it. `in_step`: requests of steps under way.
    """
    action = self._next()
    if not isinstance(action, RestoreKV):
      return frozenset()
    if self.at_hand is None and set(action.requests) & set(in_step):
      return frozenset()  # they are handed over once their step has ended
    return frozenset(action.to)

  def view(self) -> ClusterView:
    """The world as a policy sees it."""
    table = request_table(self.current.state, self.backend.checkpoints())
    return dataclasses.replace(self.backend.view(), requests=table)

  def look(self) -> None:
    """Asks for failures; a plan for them replaces what is being done."""
    failures = self.backend.poll(
      self.done if self.resuming else None, self.repairing
    )
    if failures:
      self.pending.extend(failures)
      self.unheard = True

  def rehearse(self) -> None:
    """Plans for the loss of the first and of the last rank, for nothing.

    A policy's first plan costs three times as much as the next ones.
    """
    view = self.view()
    for rank in {int(view.mesh[0]), int(view.mesh[-1])}:
      self.policy.recover(lose(view, (rank,)), RanksLost((rank,)))

  def turn(self, in_step: Collection[str]) -> None:
    """One bite: a plan, an action of it, or one of the repair.

    `in_step`: requests of steps that are under way; they aren't moved.
    """
    # What is tolerated leaves the plan at hand as it is.
    while self.pending and (self.unheard or not self.resuming):
      self._plan_for(_merge(self.pending))
    self.unheard = False
    if self._moving() & set(in_step):
      return
    if self.resuming:
      self._resume()
    elif self.repairing:
      self._repair()

  def _plan_for(self, failure: Failure) -> None:
    self._report(failure)
    plan = self._ask(failure)
    if plan is not None:
      self.plan, self.done, self.unheard = plan, 0, False
      self.resume = collections.deque(ordered(plan.resume))
      self.repair = collections.deque(_fine(ordered(plan.repair)))
      self.repairing = True

  def _resume(self) -> None:
    """The next action; or, behind the last, that service goes on."""
    if self.resume:
      self.done += 1
      self._carry_out("resume", self.resume.popleft())
      return
    assert self.plan is not None
    epoch = self.backend.view().epoch
    self.record("resumed", epoch=epoch, paused=list(self.plan.paused))
    self.plan = None

  def _repair(self) -> None:
    """One action of the repair, behind traffic, if it can be done at once."""
    if self.repair:
      self.waiting = not self.backend.ready_for(self.repair[0])
      if self.waiting:
        return
      self._carry_out("repair", self.repair.popleft())
    if not self.repair:
      self.repairing = False
      self.record("redundancy", full=True, epoch=self.backend.view().epoch)

  def _report(self, failure: Failure) -> None:
    named = getattr(failure, "ranks", None) or (failure.rank,)  # type: ignore
    self.record(
      "failure", kind=type(failure).__name__, ranks=list(named),
      epoch=self.backend.view().epoch,
    )  # fmt: skip

  def _ask(self, failure: Failure) -> Plan | None:
    start = self.clock.now()
    view = self.view()
    plan = recover_checked(self.policy, view, failure)
    name = self.policy.name
    if isinstance(plan, Infeasible):
      self.record("infeasible", policy=name, reason=plan.reason)
      self._check_hope(view, failure, plan.reason)
      return None
    self.record(
      "plan", policy=name, epoch=view.epoch, paused=list(plan.paused),
      resume=[explain(a) for a in ordered(plan.resume)],
      repair=[explain(a) for a in ordered(plan.repair)],
      seconds=self.clock.now() - start,
    )  # fmt: skip
    return plan

  def _check_hope(
    self, view: ClusterView, failure: Failure, reason: str
  ) -> None:
    """Raises Unrecoverable where service can't go on without a plan.

    A link may work again by itself, so it is given some time.
    """
    if isinstance(failure, RanksLost):
      what = f"the loss of rank(s) {list(failure.ranks)}"
    elif isinstance(failure, LinkLost) and links.needed(view, failure):
      self.in_vain[failure] += 1
      if self.in_vain[failure] < LINK_TRIES:
        return
      what = f"the loss of the link {failure.ranks}, told {LINK_TRIES} times"
    else:
      return
    raise Unrecoverable(
      f"policy {self.policy.name!r} can't recover from {what}: {reason}"
    )

  def _carry_out(self, part: str, action: Action) -> None:
    start = self.clock.now()
    self.at_hand = action
    try:
      outcome = carry_out(action, self.current, self.backend, self.record)
    finally:
      self.at_hand = None
    self.record(
      "action", part=part, name=type(action).__name__,
      explain=explain(action), seconds=self.clock.now() - start,
      bytes=outcome.nbytes, tier=outcome.tier, outcome=outcome.detail,
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
