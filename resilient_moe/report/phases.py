"""The phases of each recovery: detected, planned, resumed, redundant again."""

import dataclasses

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.history import Event, of_kind

# What of a stall is neither deciding nor an action of the plan.
BEFORE = "detect+plan"
REMAINDER = "prefill/steps"


@dataclasses.dataclass(frozen=True)
class Phases:
  """When the phases of one recovery were reached; seconds since the start.

  None: not reached in this history.
  """

  fault_s: float
  failure_s: float | None  # the detector reported it
  plan_s: float | None  # the plan was ready
  first_s: float | None  # first new token of a paused or affected answer
  last_s: float | None  # the last affected answer has a new token
  redundant_s: float | None  # full redundancy again
  actions: tuple[Event, ...]  # of its plan, in their order


def _first(events: list[Event], kind: str, from_s: float) -> Event | None:
  return next((e for e in of_kind(events, kind) if e["t"] >= from_s), None)


def _failure_of(events: list[Event], fault: Event) -> Event | None:
  """The first report of any of the ranks that broke.

  What broke without a rank (the store) was reported without one, if at all: a
  rank's failure must not be taken for it.
  """
  broken = set(fault["ranks"])
  for failure in of_kind(events, "failure"):
    named = set(failure["ranks"])
    if (broken & named or not broken | named) and failure["t"] >= fault["t"]:
      return failure
  return None


def _actions_of(events: list[Event], plan: Event) -> tuple[Event, ...]:
  """The actions between this plan and the one that replaced it."""
  found: list[Event] = []
  for event in events[events.index(plan) + 1 :]:
    if event["event"] == "plan":
      break
    if event["event"] == "action":
      found.append(event)
  return tuple(found)


def _resumed(
    ledger: ledger_lib.Ledger, fault: Event, plan: Event | None
) -> tuple[float | None, float | None]:
  """First new token of a paused answer; when all affected ones had one."""
  answers = ledger.answers()
  affected = {ledger.root(i) for i in fault["affected"] if i in ledger.requests}
  paused = plan["paused"] if plan else []
  paused_roots = {ledger.root(i) for i in paused if i in ledger.requests}
  from_s = plan["t"] if plan else fault["t"]
  firsts = {
      root: next(
          (t.t_s for t in answers[root].progress if t.t_s > from_s), None
      )
      for root in affected | paused_roots
  }
  reached = [t for t in firsts.values() if t is not None]
  last = [t for r in affected if (t := firsts[r]) is not None]
  return min(reached, default=None), max(last, default=None)


def recovery_phases(events: list[Event]) -> list[Phases]:
  """The phases of the recovery from each `fault` event."""
  found = []
  ledger = ledger_lib.ledger_of(events)
  for fault in of_kind(events, "fault"):
    failure = _failure_of(events, fault)
    plan = _first(events, "plan", failure["t"]) if failure else None
    full = [e for e in of_kind(events, "redundancy") if e["full"]]
    again = _first(full, "redundancy", fault["t"])
    first_s, last_s = _resumed(ledger, fault, plan)
    found.append(
        Phases(
            fault["t"],
            failure["t"] if failure else None,
            plan["t"] if plan else None,
            first_s,
            last_s,
            again["t"] if again else None,
            _actions_of(events, plan) if plan else (),
        )
    )
  return found


def false_alarms(events: list[Event]) -> int:
  """Failures that no fault of the injector explains.

  Whoever kills a process by hand counts as one: the history can't know.
  """
  faults = of_kind(events, "fault")
  known = [_failure_of(events, fault) for fault in faults]
  found = 0
  for failure in of_kind(events, "failure"):
    if any(failure is each for each in known):
      continue
    # Several faults may be reported as one failure, or one as several.
    named = set(failure["ranks"])
    before = [f for f in faults if f["t"] <= failure["t"]]
    if not any(named & set(f["ranks"]) or not f["ranks"] for f in before):
      found += 1
  return found


def recovery_time_s(events: list[Event]) -> float | None:
  """From a fault until all its affected answers go on; the longest.

  Of the restart, this is the horizon over which all policies are judged.
  """
  found = recovery_phases(events)
  times = [p.last_s - p.fault_s for p in found if p.last_s is not None]
  return max(times, default=None)


def stall_by_action(
    found: list[Phases], stalls: list[stalls_lib.Stalls]
) -> dict[str, float]:
  """Where the affected answers' stall went; seconds, mean over the faults.

  Args:
    found: of `recovery_phases`.
    stalls: of `fault_stalls`, for the same faults.

  Returns:
    `detect+plan` (fault to plan ready), each action of the resume part by its
    name, and `prefill/steps`: what is left of the median affected stall (at
    least 0; actions that overlap can add up to more than the stall).
  """
  total: dict[str, float] = {}
  both = zip(found, stalls, strict=True)
  pairs = [(p, s) for p, s in both if p.plan_s is not None]
  for phase, stall in pairs:
    assert phase.plan_s is not None
    spent = {BEFORE: phase.plan_s - phase.fault_s}
    for action in phase.actions:
      if action["part"] == "resume":
        name = action["name"]
        spent[name] = spent.get(name, 0.0) + action["seconds"]
    length = stalls_lib.median(list(stall.affected_s.values()))
    if length is None:
      length = stall.service_s or 0.0
    spent[REMAINDER] = max(0.0, length - sum(spent.values()))
    for name, seconds in spent.items():
      total[name] = total.get(name, 0.0) + seconds / len(pairs)
  # The remainder last, whatever actions a later fault brought in.
  return {n: s for n, s in total.items() if n != REMAINDER} | {
      n: s for n, s in total.items() if n == REMAINDER
  }


def restart_stages(events: list[Event]) -> dict[str, float]:
  """Seconds of each stage of the first restart, by name; empty without one."""
  stages: dict[str, float] = {}
  for event in of_kind(events, "engine"):
    if event["generation"] == 1:
      name = event["stage"]
      stages[name] = stages.get(name, 0.0) + event["seconds"]
  return stages
