"""What a history says about each request: the ledger that others read.

A *request* is one `accepted` event. An *answer* is what a client gets: the
request it sent first (the root) and its retries. Checkers look at requests,
stalls are measured on answers.
"""

import dataclasses
import functools

from resilient_moe.report.history import Event, RequestId


@dataclasses.dataclass(frozen=True)
class Token:
  """One emitted token; `t_s` is when it left, `position` is absolute."""

  t_s: float
  position: int
  token: int


@dataclasses.dataclass
class Request:
  """One accepted request and all that happened to it."""

  request_id: RequestId
  prompt: list[int]
  accepted_s: float
  retry_of: RequestId | None
  admitted_s: list[float] = dataclasses.field(default_factory=list)
  tokens: list[Token] = dataclasses.field(default_factory=list)
  # `finished`, `failed` and `shed` events; more than one is an error.
  outcomes: list[Event] = dataclasses.field(default_factory=list)

  @property
  def finished(self) -> bool:
    return any(o["event"] == "finished" for o in self.outcomes)

  @property
  def sequence(self) -> list[int]:
    """Prompt and emitted tokens, in the order of emission."""
    return self.prompt + [token.token for token in self.tokens]


@dataclasses.dataclass
class Ledger:
  """All requests of a history, and what belongs to no request."""

  requests: dict[RequestId, Request]
  # One sentence for each event that doesn't fit: unknown or repeated ids.
  misfits: list[str]

  def root(self, request_id: RequestId) -> RequestId:
    """The request that the client sent first."""
    seen = {request_id}
    while True:
      parent = self.requests[request_id].retry_of
      if parent is None or parent not in self.requests or parent in seen:
        return request_id
      seen.add(parent)
      request_id = parent

  def answers(self) -> "dict[RequestId, Answer]":
    """Answers by their root, in the order in which roots were accepted."""
    chains: dict[RequestId, list[Request]] = {}
    for request_id, request in self.requests.items():
      chains.setdefault(self.root(request_id), []).append(request)
    return {root: Answer(root, chain) for root, chain in chains.items()}


@dataclasses.dataclass
class Answer:
  """A request with its retries, as its client sees it.

  Attributes:
    root: the id of the first request.
    attempts: the first request and its retries, in their order.
  """

  root: RequestId
  attempts: list[Request]

  @property
  def accepted_s(self) -> float:
    return self.attempts[0].accepted_s

  @property
  def finished(self) -> Request | None:
    """The attempt that was answered in full, if one was."""
    return next((a for a in self.attempts if a.finished), None)

  @property
  def ended_s(self) -> float | None:
    """When the client had its answer, or was left without one for good."""
    outcomes = [attempt.outcomes for attempt in self.attempts]
    if self.finished is None and not all(outcomes):
      return None
    times = [
        outcome["t"]
        for each in outcomes
        for outcome in each
        if self.finished is None or outcome["event"] == "finished"
    ]
    return max(times, default=None)

  @functools.cached_property
  def progress(self) -> list[Token]:
    """The tokens that were new to the client, in order of time.

    A retry emits again what its client already had; only positions beyond
    all earlier ones are progress.
    """
    emitted = sorted(
        (token for attempt in self.attempts for token in attempt.tokens),
        key=lambda token: (token.t_s, token.position),
    )
    new, highest = [], -1
    for token in emitted:
      if token.position > highest:
        new.append(token)
        highest = token.position
    return new


def _accept(event: Event, ledger: Ledger) -> None:
  request_id, parent = event["request_id"], event.get("retry_of")
  if request_id in ledger.requests:
    ledger.misfits.append(f"request {request_id} was accepted twice")
    return
  if parent is not None and parent not in ledger.requests:
    ledger.misfits.append(
        f"request {request_id} retries {parent}, which was never accepted"
    )
  ledger.requests[request_id] = Request(
      request_id, list(event["prompt_tokens"]), event["t"], parent
  )


def _emit(event: Event, ledger: Ledger) -> None:
  for request_id, position, token in event["emitted"]:
    request = ledger.requests.get(request_id)
    if request is None:
      ledger.misfits.append(f"a token for {request_id}, never accepted")
    elif request.outcomes:
      ledger.misfits.append(f"a token for {request_id}, which had ended")
    else:
      request.tokens.append(Token(event["t"], position, token))


def _end(event: Event, ledger: Ledger) -> None:
  request = ledger.requests.get(event["request_id"])
  if request is not None:
    request.outcomes.append(event)
  elif event["event"] != "shed":
    # A request refused at the door was never accepted: nothing was promised.
    ledger.misfits.append(
        f"{event['event']} {event['request_id']}, which was never accepted"
    )


def ledger_of(events: list[Event]) -> Ledger:
  """Reads the ledger off a history."""
  ledger = Ledger({}, [])
  for event in events:
    kind = event["event"]
    if kind == "accepted":
      _accept(event, ledger)
    elif kind == "step":
      _emit(event, ledger)
    elif kind in ("finished", "failed", "shed"):
      _end(event, ledger)
    elif kind == "admitted" and event["request_id"] in ledger.requests:
      ledger.requests[event["request_id"]].admitted_s.append(event["t"])
  return ledger
