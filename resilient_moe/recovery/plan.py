"""A plan is data: a small partial order of actions, in two parts.

`resume` must finish before the paused requests go on; `repair` restores
redundancy behind traffic. The order inside a part is derived from what the
actions read and write, so an author can't remap before the copy, however the
actions are listed. A plan is never resumed, only replaced.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

from resilient_moe.recovery.actions import (
  Action,
  FailRequests,
  MaskExperts,
  RecomputePrefix,
  Requeue,
  RestoreKV,
)
from resilient_moe.recovery.checks import IllegalPlan, plannable, servable
from resilient_moe.recovery.semantics import advance
from resilient_moe.recovery.view import ClusterView


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to do after a failure."""

  resume: tuple[Action, ...]  # before the paused requests go on
  repair: tuple[Action, ...] = ()  # behind traffic; a failure abandons it
  paused: tuple[str, ...] = ()  # request ids that wait for `resume`


Resources = frozenset[str]


@functools.cache
def _order(
  reads: Resources, writes: Resources, later_reads: Resources,
  later_writes: Resources,
) -> tuple[bool, bool]:  # fmt: skip
  """Of two actions, one listed before the other: first, second must be first.

  The first if it writes what the other uses; the second if it writes what the
  first reads. Of two writers of one resource the listed order decides, so what
  both write is left out of the latter.
  """
  first = bool(writes & (later_reads | later_writes))
  return first, bool((later_writes - writes) & reads)


def ordered(part: tuple[Action, ...]) -> tuple[Action, ...]:
  """`part` in execution order: writers before readers, else as listed.

  Raises:
    ValueError: the actions wait for each other in a circle.
  """
  uses = [(action.reads, action.writes) for action in part]
  waits: list[set[int]] = [set() for _ in part]
  for i, j in itertools.combinations(range(len(part)), 2):
    before, swapped = _order(*uses[i], *uses[j])
    if before:
      waits[j].add(i)
    if swapped:
      waits[i].add(j)
  left, done, order = list(range(len(part))), set[int](), list[int]()
  while left:
    chosen = next((i for i in left if waits[i] <= done), None)
    if chosen is None:
      rest = [type(part[i]).__name__ for i in left]
      raise IllegalPlan(f"these actions wait for each other: {', '.join(rest)}")
    left.remove(chosen)
    done.add(chosen)
    order.append(chosen)
  return tuple(part[i] for i in order)


def check(
  plan: Plan,
  view: ClusterView,
  *,
  lossy: bool = False,
  fails_requests: bool = False,
) -> ClusterView:
  """The view at the end of `resume`; an illegal plan is an error.

  Nothing is executed: the actions are advanced over views. `lossy` and
  `fails_requests` are what the policy has declared.

  Raises:
    IllegalPlan: names the action, the value and the limit.
  """
  _check_promises(plan, lossy, fails_requests)
  _check_paused(plan, view)
  for action in ordered(plan.resume):
    view = _checked(view, action, plannable)
  reason = servable(view)
  if reason:
    raise IllegalPlan(f"after resume nothing can be served: {reason}")
  resumed = view
  for action in ordered(plan.repair):
    view = _checked(view, action, servable)
  return resumed


def _checked(
  view: ClusterView,
  action: Action,
  predicate: Callable[[ClusterView], str | None],
) -> ClusterView:
  name = type(action).__name__
  try:
    view = advance(view, action)
  except IllegalPlan as error:
    raise IllegalPlan(f"{name}: {error}") from error
  reason = predicate(view)
  if reason:
    raise IllegalPlan(f"{name} leaves a view that is not allowed: {reason}")
  return view


def _check_promises(plan: Plan, lossy: bool, fails_requests: bool) -> None:
  for action in plan.resume + plan.repair:
    if isinstance(action, MaskExperts) and not lossy:
      raise IllegalPlan(
        f"MaskExperts: hides experts {action.experts}, but the policy is "
        "declared lossless; declare lossless=False"
      )
    if isinstance(action, FailRequests) and not fails_requests:
      raise IllegalPlan(
        f"FailRequests: ends {len(action.requests)} requests, but the policy "
        "doesn't declare it; declare fails_requests=True"
      )


def _check_paused(plan: Plan, view: ClusterView) -> None:
  unknown = set(plan.paused) - set(view.requests.request_id)
  if unknown:
    raise IllegalPlan(f"paused request {min(unknown)!r} is not in the view")
  moving = (RestoreKV, RecomputePrefix, Requeue, FailRequests)
  for action in plan.resume:
    if isinstance(action, moving):
      running = set(action.requests) - set(plan.paused)
      if running:
        raise IllegalPlan(
          f"{type(action).__name__}: moves request {min(running)!r}, "
          "which the plan doesn't pause; add it to `paused`"
        )
