"""Checkers: what a history must show before its numbers count.

A checker is a function (events, fault-free twin or None) -> Verdict. It reads
events in the order of the file. `judge.py` runs them all.
"""

import enum
from collections.abc import Callable, Iterable
from typing import NamedTuple

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report.history import Event, RequestId, of_kind, run_of


class Value(enum.StrEnum):
  """What a checker can say."""

  TRUE = "true"
  FALSE = "false"
  UNKNOWN = "unknown"
  TOLERANCE = "true (tolerance)"
  NOT_APPLICABLE = "not applicable"


class Verdict(NamedTuple):
  """A checker's answer, with the reason in a sentence."""

  value: Value
  reason: str


Checker = Callable[[list[Event], list[Event] | None], Verdict]


def _judge(problems: Iterable[str], fine: str) -> Verdict:
  found = list(problems)
  if not found:
    return Verdict(Value.TRUE, fine)
  more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
  return Verdict(Value.FALSE, "; ".join(found[:3]) + more)


def _unaccounted(
    answer: ledger_lib.Answer, ended: bool, may_fail: bool
) -> Iterable[str]:
  """What is wrong with the outcomes of one answer."""
  for request in answer.attempts:
    kinds = [outcome["event"] for outcome in request.outcomes]
    if len(kinds) > 1:
      yield f"request {request.request_id} ended twice ({', '.join(kinds)})"
    if ended and not kinds:
      yield f"request {request.request_id} was accepted and never ended"
    if "failed" in kinds and not may_fail:
      yield f"request {request.request_id} failed; the policy must not fail any"
    for outcome in request.outcomes:
      if not outcome["reason"]:
        yield f"request {request.request_id} {outcome['event']} with no reason"
  if sum(request.finished for request in answer.attempts) > 1:
    yield f"request {answer.root} and its retry were both answered"
  failed = any(
      o["event"] == "failed" for r in answer.attempts for o in r.outcomes
  )
  if ended and failed and answer.finished is None:
    yield f"request {answer.root} failed and no retry of it finished"


def accounting(events: list[Event], twin: list[Event] | None) -> Verdict:
  """No accepted request is lost, none is answered twice.

  accepted = finished + shed + failed + in flight, each in exactly one; nothing
  is in flight at `end`. A request may fail only if the policy says that it
  fails requests, and then a retry of it must finish.
  """
  del twin
  ledger = ledger_lib.ledger_of(events)
  ended = bool(of_kind(events, "end"))
  may_fail = run_of(events)["fails_requests"]
  problems = list(ledger.misfits)
  for answer in ledger.answers().values():
    problems += _unaccounted(answer, ended, may_fail)
  return _judge(problems, f"{len(ledger.requests)} requests accounted for")


def immutability(events: list[Event], twin: list[Event] | None) -> Verdict:
  """Positions of a request are emitted once each, in order, with no gap."""
  del twin
  problems = []
  emitted: dict[RequestId, dict[int, int]] = {}
  first: dict[RequestId, int] = {}
  for event in events:
    if event["event"] == "accepted":
      first[event["request_id"]] = len(event["prompt_tokens"])
    elif event["event"] == "finished":
      request_id = event["request_id"]
      count = len(emitted.get(request_id, {}))
      if count != event["tokens"]:
        problems.append(
            f"request {request_id} finished with {event['tokens']} tokens, "
            f"{count} were emitted"
        )
    elif event["event"] == "step":
      for request_id, position, token in event["emitted"]:
        had = emitted.setdefault(request_id, {})
        where = f"request {request_id} position {position}"
        if position in had:
          problems.append(f"{where} emitted twice ({had[position]}, {token})")
        elif position != first.get(request_id, 0) + len(had):
          problems.append(
              f"{where} emitted, expected position "
              f"{first.get(request_id, 0) + len(had)}"
          )
        had[position] = token
  return _judge(problems, f"{sum(map(len, emitted.values()))} tokens")


def epochs_monotone(events: list[Event], twin: list[Event] | None) -> Verdict:
  """Epochs of steps never decrease; each `epoch` event raises the epoch."""
  del twin
  problems = []
  step_epoch, epoch = None, None
  for event in events:
    if event["event"] == "epoch":
      if epoch is not None and event["epoch"] <= epoch:
        problems.append(f"epoch {epoch} was followed by {event['epoch']}")
      epoch = event["epoch"]
    elif event["event"] == "step":
      if step_epoch is not None and event["epoch"] < step_epoch:
        problems.append(
            f"step {event['step']} in epoch {event['epoch']} after one in "
            f"epoch {step_epoch}"
        )
      step_epoch = event["epoch"]
  return _judge(problems, f"up to epoch {epoch}")


def fencing(events: list[Event], twin: list[Event] | None) -> Verdict:
  """No token was emitted by a step of an older epoch than the newest."""
  del twin
  problems = []
  newest = -1
  for event in events:
    if event["event"] == "epoch":
      newest = max(newest, event["epoch"])
    elif event.get("emitted") and event["epoch"] < newest:
      problems.append(
          f"step {event['step']} emitted tokens under epoch "
          f"{event['epoch']}, the newest is {newest}"
      )
  return _judge(problems, f"{len(of_kind(events, 'stale'))} stale refused")


def completeness(events: list[Event], twin: list[Event] | None) -> Verdict:
  """The history is whole: one `run`, first; one `end`, last; its faults."""
  del twin
  problems = []
  names = [event["event"] for event in events]
  for name, place in (("run", 0), ("end", -1)):
    if names.count(name) != 1:
      problems.append(f"{names.count(name)} `{name}` events")
    elif names[place] != name:
      problems.append(f"`{name}` is not the {'last' if place else 'first'}")
  expected = next(
      (e.get("expected_faults") for e in events if e["event"] == "run"), None
  )
  # Without this, a fault that missed would make its policy look perfect.
  if expected is not None and names.count("fault") < expected:
    problems.append(f"{names.count('fault')} faults of {expected} happened")
  return _judge(problems, f"{len(events)} events")
