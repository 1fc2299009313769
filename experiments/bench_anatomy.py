"""What a stall consists of, from a run's history and its twin's."""

import dataclasses
import time

import numpy as np

from resilient_moe import report

COPIES = 7  # of a memory-copy rate, at least
POOL_BYTES = 1 << 28  # more than any cache


@dataclasses.dataclass(frozen=True)
class Anatomy:
  """One run's recovery. Steps are median decode steps of the twin."""

  verdict: str
  step_s: float
  affected_s: list[float]  # the stall of each affected request
  stall_s: float | None  # their median
  stall_steps: float | None
  stall_max_steps: float | None
  rest_steps: float | None  # the median stall beside re-prefill and copy
  speedup: float | None  # against restart_cached
  floor_speedup: float | None  # if the stall were its floor
  copy_rate: float | None  # GB/s of CopyExperts
  copyto_rate: float | None  # GB/s of np.copyto
  by_action_steps: dict[str, float]
  stages: dict[str, float]  # of the restart, seconds


def anatomy(
  events: list[report.Event],
  twin: list[report.Event],
  restart: list[report.Event],
  copyto: float,
) -> Anatomy:
  """Takes a run with one fault apart; `copyto` in bytes/s, 0: not measured."""
  horizon_s = report.recovery_time_s(restart)
  measured = report.measure(events, twin, horizon_s=horizon_s)
  baseline = report.measure(restart, twin, horizon_s=horizon_s)
  norm = report.usual(events, twin)
  step_s = norm.step_s or 1e-9
  phases = report.recovery_phases(events)
  stalls = report.fault_stalls(events, norm, horizon_s)
  by_action = report.stall_by_action(phases, stalls)
  speedup = report.speedups(measured, baseline)["affected_speedup_vs_restart"]
  nbytes, copy_s = _copied(phases)
  prefill_s = _prefill_s(events, stalls[0])
  rest = [
    stall - prefill_s.get(root, 0.0) - copy_s
    for root, stall in stalls[0].affected_s.items()
  ]
  floor_s = _failed_step_s(events) + (nbytes / copyto if copyto else 0.0)
  floor_s += float(np.median(list(prefill_s.values()) or [0.0]))
  # As of every stall, a usual gap is no part of it; it is at least one.
  usual_s = norm.answer_gap_s or 0.0
  floor_s = max(floor_s - usual_s, usual_s)
  theirs = baseline["affected_stall_s"]
  return Anatomy(
    verdict=str(report.verdict(events, twin)["overall"]),
    step_s=step_s,
    affected_s=[s for each in stalls for s in each.affected_s.values()],
    stall_s=measured["affected_stall_s"],
    stall_steps=measured["affected_stall_steps"],
    stall_max_steps=measured["affected_stall_max_steps"],
    rest_steps=float(np.median(rest)) / step_s if rest else None,
    speedup=speedup,
    floor_speedup=theirs / floor_s if theirs and floor_s else None,
    copy_rate=nbytes / copy_s / 1e9 if nbytes else None,
    copyto_rate=copyto / 1e9 if nbytes else None,
    by_action_steps={n: s / step_s for n, s in by_action.items()},
    stages=report.restart_stages(restart),
  )


def _copied(phases: list[report.Phases]) -> tuple[int, float]:
  """Bytes and seconds of the experts copied before requests went on."""
  actions = [a for p in phases for a in p.actions if a["part"] == "resume"]
  copies = [a for a in actions if a["name"] == "CopyExperts"]
  return sum(a["bytes"] for a in copies), sum(a["seconds"] for a in copies)


def _failed_step_s(events: list[report.Event]) -> float:
  """From the last step that counted to the one that failed."""
  last, seconds = 0.0, 0.0
  for event in events:
    if event["event"] == "step":
      last = event["t"]
    elif event["event"] == "step_failed":
      seconds += event["t"] - last
  return seconds


def _prefill_s(
  events: list[report.Event], stalls: report.Stalls
) -> dict[report.RequestId, float]:
  """Seconds of the steps with prompt tokens before each one goes on."""
  answers = report.ledger_of(events).answers()
  wide = [
    (e["t"], e["seconds"])
    for e in events
    if e["event"] == "step" and e["bucket"] and e["t"] > stalls.fault_s
  ]
  found = {}
  for root in stalls.affected_s:
    times = [t.t_s for t in answers[root].progress if t.t_s > stalls.fault_s]
    until = min(times, default=stalls.fault_s)
    found[root] = sum(s for t, s in wide if t <= until)
  return found


def copyto_rate(nbytes: int) -> float:
  """Bytes per second of `np.copyto` from memory to memory, median of a few.

  Pages are touched beforehand. Copies go round a pool that no cache holds:
  the same megabyte again and again would be the cache's rate.
  """
  count = min(max(POOL_BYTES // max(nbytes, 1), 1), 256)
  source = np.ones((count, nbytes), np.uint8)
  target = np.zeros_like(source)
  np.copyto(target, source)
  seconds = []
  for i in range(max(COPIES, count)):
    start = time.perf_counter()
    np.copyto(target[i % count], source[i % count])
    seconds.append(time.perf_counter() - start)
  return nbytes / float(np.median(seconds))
