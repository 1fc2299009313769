"""How long tokens stayed away after a fault.

A *gap* is the time between two neighbouring emissions: of an answer's new
tokens (a retry's repetition of what its client had is not new), or of any
tokens at all (service). The gaps of a fault are those that end after it and
start by fault + horizon, up to the next fault; only the gap that the fault
itself falls into may reach beyond the next, and belongs to both. Each counts
whole, from the last token before it. A gap that nothing ends counts up to the
end of the history, so it is a lower bound. The *stall* of a fault is its
longest gap minus the fault-free median gap, at least 0.
"""

import dataclasses
import itertools
import math

import numpy as np

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report.history import Event, RequestId, of_kind


@dataclasses.dataclass(frozen=True)
class Usual:
  """Fault-free medians in seconds; None where there is no sample."""

  answer_gap_s: float | None
  service_gap_s: float | None
  step_s: float | None


@dataclasses.dataclass(frozen=True)
class Stalls:
  """The stalls of one fault in seconds, by the root of the answer."""

  fault_s: float
  service_s: float | None
  affected_s: dict[RequestId, float]
  unaffected_s: dict[RequestId, float]


def median(samples: list[float]) -> float | None:
  """The median, or None if there is nothing to take it of."""
  return float(np.median(samples)) if samples else None


def step_samples(events: list[Event]) -> list[float]:
  """Seconds of each decode step; of all steps if none only decoded."""
  steps = [event for event in of_kind(events, "step") if event["emitted"]]
  decode = [event for event in steps if event["bucket"] == 0]
  return [event["seconds"] for event in decode or steps]


def answer_gaps(events: list[Event]) -> list[float]:
  """All gaps between neighbouring new tokens of the same answer."""
  gaps: list[float] = []
  for answer in ledger_lib.ledger_of(events).answers().values():
    times = [token.t_s for token in answer.progress]
    gaps += [b - a for a, b in itertools.pairwise(times)]
  return gaps


def emission_times(events: list[Event]) -> list[float]:
  """When tokens left, in seconds since the start, in order."""
  return sorted(e["t"] for e in of_kind(events, "step") if e["emitted"])


def before_faults(events: list[Event]) -> list[Event]:
  """The history up to its first fault; all of it if there is none."""
  first = min((e["t"] for e in of_kind(events, "fault")), default=math.inf)
  return [event for event in events if event["t"] <= first]


def usual(events: list[Event], twin: list[Event] | None) -> Usual:
  """Fault-free medians: the twin's, else of this run before its first fault."""
  quiet = before_faults(events) if twin is None else twin
  times = emission_times(quiet)
  return Usual(
      median(answer_gaps(quiet)),
      median([b - a for a, b in itertools.pairwise(times)]),
      median(step_samples(quiet)),
  )


@dataclasses.dataclass(frozen=True)
class _Window:
  """Where the gaps of a fault lie; seconds since the start."""

  fault_s: float
  until_s: float  # a gap starts by then
  next_s: float  # the next fault
  end_s: float  # of the history

  def gaps(self, times: list[float]) -> list[tuple[float, float]]:
    """The gaps between neighbouring `times` that belong to the fault."""
    return [
        (a, b)
        for a, b in itertools.pairwise(times)
        if b > self.fault_s and a <= self.until_s
        if b <= self.next_s or a <= self.fault_s
    ]


def _answer_gap(
    answer: ledger_lib.Answer, affected: bool, window: _Window
) -> float | None:
  """The longest gap of one answer; None if the fault found it not running."""
  times = [token.t_s for token in answer.progress]
  ended_s = math.inf if answer.ended_s is None else answer.ended_s
  if answer.accepted_s > window.fault_s or ended_s <= window.fault_s:
    return None
  if answer.finished is None:
    times.append(window.end_s)
  if not answer.progress or answer.progress[0].t_s > window.fault_s:
    # Without a token yet: it may just be waiting in the queue.
    if not affected:
      return None
    # Lost in its prefill: what it waited before is not the fault's doing.
    times.insert(0, window.fault_s)
  return max((b - a for a, b in window.gaps(times)), default=None)


def _busy(answers: list[ledger_lib.Answer], end_s: float) -> list[list[float]]:
  """Disjoint intervals [from, to] in which some client waited for tokens."""
  merged: list[list[float]] = []
  spans = [
      (a.accepted_s, end_s if a.ended_s is None else a.ended_s)
      for a in answers
  ]
  for start, stop in sorted(spans):
    if merged and start <= merged[-1][1]:
      merged[-1][1] = max(merged[-1][1], stop)
    else:
      merged.append([start, stop])
  return merged


def _service_gap(
    times: list[float], busy: list[list[float]], window: _Window
) -> float | None:
  """The longest stretch without a token while some client waited for one."""
  edges = [*(times or [window.fault_s]), window.end_s]
  pieces = [
      min(b, stop) - max(a, start)
      for a, b in window.gaps(edges)
      for start, stop in busy
      if min(b, stop) > max(a, start, window.fault_s)
  ]
  return max(pieces, default=None)


def _over(gap_s: float | None, usual_s: float | None) -> float | None:
  return None if gap_s is None else max(0.0, gap_s - (usual_s or 0.0))


def fault_stalls(
    events: list[Event], norm: Usual, horizon_s: float | None = None
) -> list[Stalls]:
  """The stalls of each fault.

  Args:
    events: the history.
    norm: the fault-free medians, of `usual`.
    horizon_s: how long after a fault a gap may start; the restart's time, so
      that all policies are looked at for equally long. None: to the end.

  Returns:
    One `Stalls` for each `fault` event. Unaffected are the answers that ran
    at the fault, had a token, and were on none of the lost ranks.
  """
  ledger = ledger_lib.ledger_of(events)
  answers = ledger.answers()
  times, end_s = emission_times(events), max(event["t"] for event in events)
  busy = _busy(list(answers.values()), end_s)
  faults = of_kind(events, "fault")
  found = []
  for fault, after in itertools.zip_longest(faults, faults[1:]):
    window = _Window(
        fault["t"],
        fault["t"] + (math.inf if horizon_s is None else horizon_s),
        after["t"] if after else math.inf,
        end_s,
    )
    hit = {ledger.root(i) for i in fault["affected"] if i in ledger.requests}
    service = _service_gap(times, busy, window)
    stalls: dict[bool, dict[RequestId, float]] = {True: {}, False: {}}
    for root, answer in answers.items():
      gap = _answer_gap(answer, root in hit, window)
      stall = _over(gap, norm.answer_gap_s)
      if stall is not None:
        stalls[root in hit][root] = stall
    found.append(
        Stalls(
            window.fault_s,
            _over(service, norm.service_gap_s),
            stalls[True],
            stalls[False],
        )
    )
  return found
