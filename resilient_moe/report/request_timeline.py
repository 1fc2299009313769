"""Requests around a fault, one by one: their tokens, gaps and ranks.

A request here is an answer of the ledger: what a client sent first, with its
retries. Its gaps are those that `stalls.py` defines.
"""

import dataclasses
import itertools
import math
import re
from typing import Any

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report import phases as phases_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.history import Event, RequestId, of_kind

_PLACING = ("RestoreKV", "RecomputePrefix")
_TO = re.compile(r"(\S+)->(\d+)")


@dataclasses.dataclass(frozen=True)
class RequestTimeline:
  """One request around one fault; times in seconds since the run's start."""

  fault: Event
  window_s: tuple[float, float]  # what was looked at
  request_id: RequestId
  affected: bool  # it ran on a lost rank
  rank_before: int | None  # at the fault; None: it sat nowhere
  rank_after: int | None  # after its gap; None: nowhere, or nothing tells
  tokens_s: tuple[float, ...]  # when its new tokens left, in the window
  last_before_s: float | None  # its last token by the fault, ...
  first_after_s: float | None  # its next one, be they in the window or not
  gap_s: tuple[float, float] | None  # its longest; None: it didn't run
  open: bool  # no token ends the gap, only the history does
  usual_s: float | None  # the fault-free median gap
  paused_s: float | None  # the plan that paused it was ready
  moved_s: float | None
  moved: str | None  # how: restore | recompute | requeue
  resumed_s: float | None  # that plan was carried out

  @property
  def stall_s(self) -> float | None:
    """What the gap is longer than a usual one."""
    if self.gap_s is None:
      return None
    return max(0.0, self.gap_s[1] - self.gap_s[0] - (self.usual_s or 0.0))

  @property
  def stall_gaps(self) -> float | None:
    """The stall in usual gaps."""
    if self.stall_s is None or not self.usual_s:
      return None
    return self.stall_s / self.usual_s


def _placed(event: Event) -> dict[str, int | None]:
  """The requests that an event gives a rank (None: it doesn't say which)."""
  kind = event["event"]
  if kind == "admitted":
    return {str(event["request_id"]): event["rank"]}
  if kind == "requests_moved":
    moved = [str(name) for name in event["request_ids"]]
    to = event.get("to") or [None] * len(moved)
    return dict(zip(moved, to, strict=True))
  if kind == "action" and event["name"] in _PLACING:
    # All that tells without `to`; it names the first few requests only.
    return {name: int(rank) for name, rank in _TO.findall(event["explain"])}
  return {}


class _Seats:
  """Where each answer sat, as far as a history tells."""

  def __init__(self, events: list[Event], ledger: ledger_lib.Ledger):
    self._seats: dict[RequestId, list[tuple[int, float, int | None]]] = {}
    roots = {str(name): ledger.root(name) for name in ledger.requests}
    for index, event in enumerate(events):
      for name, rank in _placed(event).items():
        if name in roots:
          seats = self._seats.setdefault(roots[name], [])
          seats.append((index, event["t"], rank))

  def before(self, root: RequestId, index: int) -> int | None:
    """By the event's index: at a fault, several events can share a time."""
    seats = self._seats.get(root, [])
    return next((s[2] for s in reversed(seats) if s[0] < index), None)

  def at(self, root: RequestId, t_s: float) -> int | None:
    seats = self._seats.get(root, [])
    return next((s[2] for s in reversed(seats) if s[1] <= t_s), None)


def _ended_s(answer: ledger_lib.Answer) -> float:
  return math.inf if answer.ended_s is None else answer.ended_s


def _affected(
    fault: Event, ledger: ledger_lib.Ledger, sat: dict[RequestId, int | None]
) -> list[RequestId]:
  """Those that the injector names, and whoever sat on a lost rank."""
  named = {ledger.root(i) for i in fault["affected"] if i in ledger.requests}
  lost = fault["ranks"] if "lost" in fault["kind"] else ()
  return [root for root, rank in sat.items() if rank in lost or root in named]


def _gap(
    times: list[float], fault_s: float, end_s: float, length_s: float
) -> tuple[float, float]:
  """Where the gap is; how long it is, `fault_stalls` has said."""
  if not times or times[0] > fault_s:
    times = [fault_s, *times]
  gaps = itertools.pairwise([*times, end_s])
  return next(g for g in gaps if g[1] > fault_s and g[1] - g[0] == length_s)


def _after_plan(events: list[Event], plan_s: float | None) -> list[Event]:
  """The history from the plan of this time until all is resumed."""
  found: list[Event] = []
  for event in events:
    if found or (event["event"] == "plan" and event["t"] == plan_s):
      found.append(event)
    if found and event["event"] == "resumed":
      break
  return found


def _handling(names: set[RequestId], after: list[Event]) -> dict[str, Any]:
  """When one request was paused, moved and resumed."""
  keys = ("paused_s", "moved_s", "moved", "resumed_s")
  found: dict[str, Any] = dict.fromkeys(keys)
  for event in after:
    kind, t_s = event["event"], event["t"]
    if kind == "plan" and names & set(event["paused"]):
      found["paused_s"] = found["paused_s"] or t_s
    elif kind == "requests_moved" and names & set(event["request_ids"]):
      found |= {"moved_s": t_s, "moved": event["kind"]}
    elif kind == "resumed" and names & set(event["paused"]):
      found["resumed_s"] = t_s
  return found


@dataclasses.dataclass(frozen=True)
class _Around:
  """One fault, and what was there."""

  fault: Event
  window_s: tuple[float, float]
  sat: dict[RequestId, int | None]  # the answers that ran, and their ranks
  gaps_s: dict[RequestId, float]  # the longest of each
  after: list[Event]  # from its plan on
  end_s: float

  def timeline(
      self, answer: ledger_lib.Answer, seats: _Seats, usual_s: float | None
  ) -> RequestTimeline:
    root, fault_s = answer.root, self.fault["t"]
    times = [token.t_s for token in answer.progress]
    after_s = next((t for t in times if t > fault_s), None)
    gap = None
    if root in self.gaps_s:
      gap = _gap(times, fault_s, self.end_s, self.gaps_s[root])
    is_open = gap is not None and gap[1] not in times
    back_s = after_s if gap is None else None if is_open else gap[1]
    from_s, until_s = self.window_s
    return RequestTimeline(
        fault=self.fault,
        window_s=self.window_s,
        request_id=root,
        affected=root in self.fault["affected"],
        rank_before=self.sat.get(root),
        rank_after=None if back_s is None else seats.at(root, back_s),
        tokens_s=tuple(t for t in times if from_s <= t <= until_s),
        last_before_s=max((t for t in times if t <= fault_s), default=None),
        first_after_s=after_s,
        gap_s=gap,
        open=is_open,
        usual_s=usual_s,
        **_handling({a.request_id for a in answer.attempts}, self.after),
    )


def _arounds(
    events: list[Event],
    ledger: ledger_lib.Ledger,
    seats: _Seats,
    around_s: float,
) -> list[_Around]:
  """Every fault; its `affected` then names roots, all of them."""
  answers, told, sitting = ledger.answers(), list(events), []
  for index, event in enumerate(events):
    if event["event"] == "fault":
      sat = {
          root: seats.before(root, index)
          for root, answer in answers.items()
          if answer.accepted_s <= event["t"] < _ended_s(answer)
      }
      sitting.append(sat)
      told[index] = event | {"affected": _affected(event, ledger, sat)}
  # Without a usual gap to take off, the stalls are the whole gaps.
  whole = stalls_lib.Usual(None, None, None)
  return [
      _Around(
          fault,
          (fault["t"] - around_s, fault["t"] + around_s),
          sat,
          stalls.affected_s | stalls.unaffected_s,
          _after_plan(events, phases.plan_s),
          max(event["t"] for event in events),
      )
      for fault, sat, stalls, phases in zip(
          of_kind(told, "fault"),
          sitting,
          stalls_lib.fault_stalls(told, whole, around_s),
          phases_lib.recovery_phases(told),
          strict=True,
      )
  ]


def request_timelines(
    events: list[Event], around_s: float, twin: list[Event] | None = None
) -> list[RequestTimeline]:
  """Every request that was there around a fault, for every fault.

  Args:
    events: the history.
    around_s: how long before and after a fault to look, in seconds; a gap
      that starts by then counts whole.
    twin: the fault-free run, for the usual gap; without it that of this run
      before its first fault.

  Returns:
    By fault; of each the affected first, then in the order of acceptance.
  """
  if not of_kind(events, "fault"):
    return []
  ledger = ledger_lib.ledger_of(events)
  seats = _Seats(events, ledger)
  usual_s, found = stalls_lib.usual(events, twin).answer_gap_s, []
  for around in _arounds(events, ledger, seats, around_s):
    from_s, until_s = around.window_s
    mine = [
        around.timeline(answer, seats, usual_s)
        for answer in ledger.answers().values()
        if answer.accepted_s <= until_s and _ended_s(answer) > from_s
    ]
    found += sorted(mine, key=lambda each: not each.affected)
  return found
