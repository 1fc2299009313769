"""One request's text before and after the fault, for people to read."""

from collections.abc import Callable
from typing import NamedTuple

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report.history import Event, RequestId, of_kind


class BeforeAndAfter(NamedTuple):
  """The text of an answer, split where the fault struck."""

  request_id: RequestId
  prompt: str
  before: str
  after: str


def _split(
    answer: ledger_lib.Answer, fault_s: float
) -> tuple[list[int], list[int]]:
  new = answer.progress
  return (
      [token.token for token in new if token.t_s <= fault_s],
      [token.token for token in new if token.t_s > fault_s],
  )


def affected_requests(events: list[Event]) -> list[RequestId]:
  """The answers that a fault hit in mid-sentence, by their root.

  First the one whose sentence was hit nearest to its middle.
  """
  ledger = ledger_lib.ledger_of(events)
  answers = ledger.answers()
  shorter: dict[RequestId, int] = {}
  for fault in of_kind(events, "fault"):
    for request_id in fault["affected"]:
      if request_id in ledger.requests:
        root = ledger.root(request_id)
        sides = _split(answers[root], fault["t"])
        if all(sides):
          shorter.setdefault(root, min(map(len, sides)))
  return sorted(shorter, key=lambda root: -shorter[root])


def before_and_after(
    events: list[Event],
    decode: Callable[[list[int]], str],
    request_id: RequestId | None = None,
) -> BeforeAndAfter:
  """The text of one affected request up to the fault that hit it, and after.

  Args:
    events: the history.
    decode: token ids to text.
    request_id: which request; default the one hit nearest to its middle.

  Raises:
    ValueError: if no fault hit the request in mid-sentence.
  """
  choices = affected_requests(events)
  ledger = ledger_lib.ledger_of(events)
  chosen = choices[0] if request_id is None and choices else request_id
  root = ledger.root(chosen) if chosen in ledger.requests else chosen
  if root is None or root not in choices:
    raise ValueError(
        f"request {request_id} was not hit by a fault in mid-sentence; those "
        f"that were: {', '.join(map(str, choices)) or 'none'}"
    )
  answer = ledger.answers()[root]
  members = {attempt.request_id for attempt in answer.attempts}
  fault = next(
      f for f in of_kind(events, "fault") if members & set(f["affected"])
  )
  before, after = _split(answer, fault["t"])
  prompt = answer.attempts[0].prompt
  return BeforeAndAfter(root, decode(prompt), decode(before), decode(after))
