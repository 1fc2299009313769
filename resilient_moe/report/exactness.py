"""The checker that compares a run with its fault-free twin, by token."""

from typing import NamedTuple

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report.checkers import Value, Verdict
from resilient_moe.report.history import Event, RequestId, of_kind, run_of


def finished_sequences(events: list[Event]) -> dict[RequestId, list[int]]:
  """Prompt + tokens of each finished answer, by the id of its root."""
  answers = ledger_lib.ledger_of(events).answers()
  return {
      root: answer.finished.sequence
      for root, answer in answers.items()
      if answer.finished is not None
  }


class Compared(NamedTuple):
  """Answers beside the fault-free twin's."""

  finished: int  # in the twin
  lost: int  # of those, not finished here
  equal: int  # of those, finished here with the same tokens


def compared(events: list[Event], twin: list[Event]) -> Compared:
  """Counts the answers of the twin that are here, and that are equal."""
  ours, theirs = finished_sequences(events), finished_sequences(twin)
  equal = sum(ours.get(root) == each for root, each in theirs.items())
  return Compared(len(theirs), len(theirs.keys() - ours.keys()), equal)


def changed_tokens(events: list[Event], twin: list[Event]) -> int:
  """Emitted tokens that are not the twin's at their position.

  Of all answers, finished or not: a client saw them.
  """
  theirs = finished_sequences(twin)
  ledger = ledger_lib.ledger_of(events)
  return sum(
      token.token not in theirs.get(ledger.root(request_id), [])
      [token.position : token.position + 1]
      for request_id, request in ledger.requests.items()
      for token in request.tokens
  )


def repeated_tokens(events: list[Event]) -> int:
  """Emissions at a position that the same request had been given before."""
  seen: set[tuple[RequestId, int]] = set()
  count = 0
  for event in of_kind(events, "step"):
    for request_id, position, _ in event["emitted"]:
      count += (request_id, position) in seen
      seen.add((request_id, position))
  return count


def _prompts(events: list[Event]) -> dict[RequestId, list[int]]:
  return {
      event["request_id"]: event["prompt_tokens"]
      for event in of_kind(events, "accepted")
  }


def no_twin(events: list[Event], twin: list[Event] | None) -> str:
  """Why `twin` can't serve as the fault-free twin; empty if it can."""
  if twin is None:
    return "there is no fault-free twin"
  if of_kind(twin, "fault"):
    return "the twin has faults"
  if not of_kind(twin, "end"):
    return "the twin did not end"
  prompts = _prompts(twin)
  for root, prompt in _prompts(events).items():
    if prompts.get(root, prompt) != prompt:
      return f"request {root} has another prompt in the twin"
  seeds = run_of(events)["seed"], run_of(twin)["seed"]
  if seeds[0] != seeds[1]:
    return f"the twin has seed {seeds[1]}, the run {seeds[0]}"
  return ""


def _tolerated(events: list[Event], roots: list[RequestId]) -> Verdict:
  """Judges differing answers of a backend that can't be bit exact."""
  # A retry finishes under its own id; the evidence is about the answer.
  ledger = ledger_lib.ledger_of(events)
  replayed: dict[RequestId, list[Event]] = {}
  for event in of_kind(events, "replayed"):
    replayed.setdefault(ledger.root(event["request_id"]), []).append(event)
  lacking = [root for root in roots if root not in replayed]
  wide = [
      event
      for root in roots
      for event in replayed.get(root, ())
      # Not `>`: a margin that compares with nothing must not pass.
      if not event["margin"] <= event["limit"]
  ]
  if wide:
    return Verdict(
        Value.FALSE,
        f"request {wide[0]['request_id']} misses the fault-free choice by "
        f"{wide[0]['margin']} > {wide[0]['limit']}",
    )
  if lacking:
    return Verdict(
        Value.UNKNOWN,
        f"{len(lacking)} answers differ and were not replayed, the first: "
        f"request {lacking[0]}",
    )
  return Verdict(
      Value.TOLERANCE, f"{len(roots)} answers differ, all within the margin"
  )


def _difference(root: RequestId, ours: list[int], theirs: list[int]) -> str:
  for position, (a, b) in enumerate(zip(ours, theirs, strict=False)):
    if a != b:
      return f"request {root} position {position}: {a}, fault-free {b}"
  return f"request {root}: {len(ours)} tokens, fault-free {len(theirs)}"


def exactness(events: list[Event], twin: list[Event] | None) -> Verdict:
  """Every finished answer has the tokens of the fault-free run.

  Retries are compared as the answer to the request that they retry. Lossy
  policies promise nothing, so nothing is checked. On a backend that can't be
  bit exact, answers that differ need a `replayed` event within its limit.
  """
  run = run_of(events)
  if not run["lossless"]:
    return Verdict(Value.NOT_APPLICABLE, "the policy is lossy")
  if run["policy"] == "none" and not of_kind(events, "fault"):
    return Verdict(Value.NOT_APPLICABLE, "this is the fault-free run")
  problem = no_twin(events, twin)
  if problem or twin is None:
    return Verdict(Value.UNKNOWN, problem)
  ours, theirs = finished_sequences(events), finished_sequences(twin)
  differ = [r for r in ours if r in theirs and ours[r] != theirs[r]]
  if differ and not run["exact"]:
    verdict = _tolerated(events, differ)
    if verdict.value != Value.TOLERANCE:
      return verdict
  elif differ:
    root = differ[0]
    reason = _difference(root, ours[root], theirs[root])
    return Verdict(Value.FALSE, f"{len(differ)} answers differ; {reason}")
  else:
    verdict = Verdict(Value.TRUE, f"{len(ours)} answers equal the twin's")
  lacking = [root for root in ours if root not in theirs]
  if lacking:
    return Verdict(
        Value.UNKNOWN, f"request {lacking[0]} did not finish in the twin"
    )
  return verdict
