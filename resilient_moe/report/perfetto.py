"""A run as Chrome's trace events, which Perfetto opens.

The orchestrator's process shows the history, those of the workers their spans,
and one more the requests.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from resilient_moe.report import curves as curves_lib
from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report import phases as phases_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.history import Event, of_kind, read_history
from resilient_moe.report.runs import Path, write_text
from resilient_moe.report.spans import Span, read_spans

TraceEvent = dict[str, Any]

_HOME = "orchestrator"
_SHORT = {"attention": "AW", "expert": "EW", "collocated": "rank"}
_BINS = 2000  # points of the counter; beyond it viewers get slow
_ROWS = {
    "faults": ("fault", "failure"),
    "healing": ("healed",),
    "plans": ("plan", "infeasible", "resumed"),
    "membership": ("epoch", "redundancy", "stale"),
    "requests": ("requests_moved", "failed", "shed"),
    "steps": ("step", "step_failed"),
    "engine": ("engine", "mesh_ready", "prepare", "warning"),
}
_ROW_OF = {kind: row for row, kinds in _ROWS.items() for kind in kinds}
# Fields that make the name of an event more than its kind.
_TITLES = {
    "action": "{name}",
    "engine": "{stage}",
    "epoch": "epoch {epoch}",
    "failure": "failure: {kind} {ranks}",
    "fault": "fault: {kind} {ranks}",
    "healed": "AW {by} healed from {rank}",
    "requests_moved": "{kind}",
}


class _Slice(NamedTuple):
  """In whole nanoseconds: what only touches must not overlap by rounding."""

  start: int
  end: int
  name: str
  args: dict[str, Any]


def _ns(seconds: float) -> int:
  return round(seconds * 1e9)


def _slice(t0: float, t1: float, name: str, args: dict[str, Any]) -> _Slice:
  return _Slice(_ns(t0), max(_ns(t0), _ns(t1)), name, args)


def _lanes(slices: list[_Slice]) -> list[list[_Slice]]:
  """Rows in which any two slices are apart or one within the other."""
  lanes: list[list[_Slice]] = []
  opened: list[list[int]] = []  # of each lane, the ends of what goes on
  for each in sorted(slices, key=lambda s: (s.start, -s.end)):
    for lane, ends in zip(lanes, opened, strict=True):
      while ends and ends[-1] <= each.start:
        ends.pop()
      if not ends or each.end <= ends[-1]:
        lane.append(each)
        ends.append(each.end)
        break
    else:
      lanes.append([each])
      opened.append([each.end])
  return lanes


class _Process:
  """The events of one process of the trace; rows are its threads."""

  def __init__(self, pid: int, name: str):
    self.pid = pid
    self.events: list[TraceEvent] = []
    self._tids: dict[str, int] = {}
    self._describe("process", 0, name, pid)

  def _describe(self, what: str, tid: int, name: str, order: int) -> None:
    for key, value in (("name", name), ("sort_index", order)):
      self.add(f"{what}_{key}", "M", None, tid, args={key: value})

  def add(
      self, name: str, phase: str, ns: int | None, tid: int, **more: Any
  ) -> None:
    time = {} if ns is None else {"ts": ns / 1e3}
    event = {"name": name, "ph": phase, "pid": self.pid, "tid": tid}
    self.events.append(event | time | more)

  def row(self, name: str) -> int:
    """The thread of a row."""
    if name not in self._tids:
      self._tids[name] = len(self._tids) + 1
      self._describe("thread", self._tids[name], name, self._tids[name])
    return self._tids[name]

  def fill(self, row: str, slices: list[_Slice]) -> None:
    """A row of slices; it goes on in `ROW 2` where they overlap."""
    for number, lane in enumerate(_lanes(slices), 1):
      tid = self.row(row if number == 1 else f"{row} {number}")
      for each in lane:
        dur = (each.end - each.start) / 1e3
        self.add(each.name, "X", each.start, tid, dur=dur, args=each.args)

  def mark(self, event: Event, row: str, scope: str) -> None:
    name, args = _title(event), _details(event)
    self.add(name, "i", _ns(event["t"]), self.row(row), s=scope, args=args)


def _title(event: Event) -> str:
  if event["event"] == "step":
    return "prefill" if event["bucket"] else "decode"
  return str(_TITLES.get(event["event"], event["event"])).format(**event)


def _details(event: Event) -> dict[str, Any]:
  # Tokens as such say nothing here, and there are many.
  args = {k: len(v) if k == "emitted" else v for k, v in event.items()}
  return {k: v for k, v in args.items() if k not in ("event", "t")}


def _recovery(events: list[Event]) -> list[_Slice]:
  """How each fault was detected, decided on and resumed from."""
  found = []
  for phases in phases_lib.recovery_phases(events):
    last_s = phases.fault_s
    times = (phases.failure_s, phases.plan_s, phases.first_s)
    for name, time_s in zip(("detect", "plan", "resume"), times, strict=True):
      if time_s is None:
        break
      found.append(_slice(last_s, time_s, name, {}))
      last_s = max(last_s, time_s)
  return found


def _row_of(event: Event) -> str | None:
  """The row of the orchestrator that shows an event; None: not shown."""
  kind = event["event"]
  if kind == "step" and "domain" in event:
    # Each steps by itself: what overlaps there is no error of a clock.
    return f"steps of {'+'.join(map(str, event['domain']))}"
  return event["part"] if kind == "action" else _ROW_OF.get(kind)


def _history(events: list[Event], process: _Process) -> None:
  """The rows of the orchestrator."""
  rows: dict[str, list[_Slice]] = {"recovery": _recovery(events)}
  stepped_s: dict[str, float] = {}  # by row
  for event in events:
    kind, end_s = event["event"], event["t"]
    row = _row_of(event)
    if row is None:
      continue
    if "seconds" not in event:
      # Across all processes, so that what a fault did there can be seen.
      process.mark(event, row, "g" if kind == "fault" else "t")
      continue
    start_s = end_s - event["seconds"]
    if kind == "step":
      # Timed where it ran, stamped at the gateway: it may seem to overlap.
      start_s = max(start_s, stepped_s.get(row, -math.inf))
      stepped_s[row] = end_s
    found = _slice(start_s, end_s, _title(event), _details(event))
    rows.setdefault(row, []).append(found)
  for row, slices in rows.items():
    process.fill(row, slices)


def _rate(events: list[Event], process: _Process) -> None:
  """Tokens per second as a counter, over bins of a usual step or more."""
  times, tokens = curves_lib.cumulative(events, 0.0)
  if times[-1] <= times[0]:
    return
  steps = stalls_lib.step_samples(stalls_lib.before_faults(events))
  width = max(stalls_lib.median(steps) or 0.0, (times[-1] - times[0]) / _BINS)
  count = math.ceil((times[-1] - times[0]) / width)
  edges = times[0] + width * np.arange(count + 1)
  rates = np.diff(np.interp(edges, times, tokens)) / width
  for time_s, rate in zip(edges, [*rates, 0.0], strict=True):
    args = {"tokens/s": round(float(rate), 3)}
    process.add("tokens/s", "C", _ns(time_s), 0, args=args)


def _requests(events: list[Event], process: _Process) -> None:
  """An async slice for each answer, from its promise to its end."""
  last_s = events[-1]["t"] if events else 0.0
  for root, answer in ledger_lib.ledger_of(events).answers().items():
    end_s = last_s if answer.ended_s is None else answer.ended_s
    which = {"cat": "request", "id": str(root)}
    args = {"tokens": len(answer.progress), "attempts": len(answer.attempts)}
    each = _slice(answer.accepted_s, end_s, str(root), args)
    process.add(each.name, "b", each.start, 0, args=args, **which)
    process.add(each.name, "e", each.end, 0, **which)


def _worker(spans: list[Span], process: _Process) -> None:
  """One row, or one for each kind of span if kinds overlap."""
  kinds: dict[str, list[_Slice]] = {}
  for s in spans:
    args = s["args"] | {"incarnation": s.get("incarnation", 0)}
    kind = kinds.setdefault(s["name"], [])
    kind.append(_slice(s["t0"], s["t1"], s["name"], args))
  work = [each for slices in kinds.values() for each in slices]
  kinds = {"work": work} if len(_lanes(work)) == 1 else kinds
  for row, slices in kinds.items():
    process.fill(row, slices)


def trace(events: list[Event], spans: list[Span]) -> dict[str, Any]:
  """A history and its processes' spans as what Perfetto opens, once JSON.

  Times count from the run's start.
  """
  groups: dict[tuple[bool, str, int], list[Span]] = {(False, _HOME, 0): []}
  for span in spans:
    role = str(_SHORT.get(span["role"], span["role"]))
    rank = 0 if role == _HOME else span["rank"]
    groups.setdefault((role != _HOME, role, rank), []).append(span)
  processes = []
  # From 1: process 0 means the idle one to Perfetto.
  for pid, (away, role, rank) in enumerate(sorted(groups), 1):
    process = _Process(pid, f"{role} {rank}" if away else role)
    processes.append(process)
    if not away:
      _history(events, process)
      _rate(events, process)
    _worker(groups[away, role, rank], process)
    for fault in of_kind(events, "fault"):
      if away and rank in fault["ranks"]:
        process.mark(fault, "faults", "p")
  processes.append(_Process(len(processes) + 1, "requests"))
  _requests(events, processes[-1])
  found = [event for process in processes for event in process.events]
  # Names first. A stable sort: of two that begin at once, the first holds.
  found.sort(key=lambda event: event.get("ts", -math.inf))
  return {"traceEvents": found, "displayTimeUnit": "ms"}


def write_trace(folder: Path, out: Path) -> None:
  """Writes the trace of a run's folder: `history.jsonl`, `spans/` if any.

  A run that was cut off gives what there is of it.
  """
  folder = pathlib.Path(folder)
  events = read_history(folder / "history.jsonl", partial_ok=True)
  found = trace(events, read_spans(folder / "spans"))
  write_text(out, json.dumps(found, allow_nan=False))
