"""The checker of failure domains: who isn't named by a recovery goes on in it.

Only where attention ranks step apart, in processes of their own. It can't say
`false`: whether a pause was the recovery's or the machine's, no history tells.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.checkers import Value, Verdict
from resilient_moe.report.history import Event, RequestId, of_kind, run_of

_GAPS = 4  # usual ones: a recovery must take longer for a pause to be seen
_LONGEST = 2  # and this many of the longest one so far: what the machine does
_SAMPLES = 8  # gaps that make a usual one


@dataclasses.dataclass(frozen=True)
class _Recovery:
  """From a failure's report until service is resumed."""

  from_s: float
  until_s: float
  named: frozenset[RequestId]  # paused by its plans, or hit by its faults


def confined(events: list[Event], twin: list[Event] | None) -> Verdict:
  """A fault pauses the requests it names and no others.

  Looked at are recoveries that are long enough, for requests that emitted
  tokens before and after. `unknown` if none of a recovery's got one in it.
  """
  del twin
  run = run_of(events)
  if run["deployment"] != "disaggregated" or run["runtime"] != "process":
    return Verdict(
        Value.NOT_APPLICABLE, "its ranks don't step apart in processes"
    )
  requests = ledger_lib.ledger_of(events).requests.values()
  seen = went_on = 0
  for recovery in _recoveries(events):
    paused = [
        request.request_id
        for request in requests
        if request.request_id not in recovery.named
        and _waited(request, recovery, events)
    ]
    others = [
        request.request_id
        for request in requests
        if request.request_id not in recovery.named
        and _emitted_in(request, recovery)
    ]
    seen += bool(paused or others)
    went_on += len(others)
    if paused and not others:
      length_s = recovery.until_s - recovery.from_s
      return Verdict(
          Value.UNKNOWN,
          f"no token for {length_s:.3g} s of a recovery at"
          f" {recovery.from_s:.3f} s that names none of {paused[:3]}",
      )
  if not seen:
    return Verdict(Value.NOT_APPLICABLE, "no recovery with others beside it")
  return Verdict(
      Value.TRUE, f"{went_on} requests went on in {seen} recoveries"
  )


def _recoveries(events: list[Event]) -> Iterator[_Recovery]:
  """Those that were carried out; of failures in one, from the last on."""
  from_s: float | None = None
  named: set[RequestId] = set()
  struck: list[Event] = []  # faults whose recovery isn't over
  for event in events:
    kind = event["event"]
    if kind == "fault":
      struck.append(event)
    elif kind == "failure":
      from_s = event["t"]
    elif kind == "plan":
      named |= set(event["paused"])
    elif kind == "engine" and event["generation"]:
      from_s = None  # a restart: all are named
    elif kind == "resumed":
      hit = {name for fault in struck for name in fault["affected"]}
      if from_s is not None:
        yield _Recovery(from_s, event["t"], frozenset(named | hit))
      # What struck after that report has a recovery to come.
      struck = [f for f in struck if from_s is not None and f["t"] > from_s]
      from_s, named = None, set()


def _emitted_in(request: ledger_lib.Request, recovery: _Recovery) -> bool:
  """Whether it was running before, and got a token in the recovery."""
  times = [token.t_s for token in request.tokens]
  running = bool(times) and times[0] <= recovery.from_s
  return running and any(
      recovery.from_s < t <= recovery.until_s for t in times
  )


def _waited(
    request: ledger_lib.Request, recovery: _Recovery, events: list[Event]
) -> bool:
  """Whether it stood still for all of a recovery that is long for it."""
  times = [token.t_s for token in request.tokens]
  before = [t for t in times if t <= recovery.from_s]
  after = [t for t in times if t > recovery.until_s]
  gaps = [b - a for a, b in itertools.pairwise(before)]
  if len(before) + len(after) < len(times) or not after:
    return False  # it got one in it, or had ended
  if len(gaps) < _SAMPLES:
    return False
  usual_s = stalls_lib.median(gaps) or 0.0
  least_s = max(_GAPS * usual_s, _LONGEST * max(gaps))
  if recovery.until_s - recovery.from_s <= least_s:
    return False
  # Whoever an earlier plan moved may be in the queue, or in its prefill.
  return not any(
      before[-1] < moved["t"] <= recovery.until_s
      and request.request_id in moved["request_ids"]
      for moved in of_kind(events, "requests_moved")
  )
