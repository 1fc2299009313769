"""A run that its gateway did not see to the end, as its history tells it.

The history on disk is the journal: a request is accepted, and a token has
left, once it is written there. A gateway that starts where another has died
takes the requests and their tokens from it, and an engine that died by itself
is replaced in the same way.
"""

import dataclasses
import os
import pathlib
import time

from resilient_moe.report import Event, read_history
from resilient_moe.serving.request import Request

INJECTOR = "injector.json"  # the faults that have struck; beside the scratch


@dataclasses.dataclass
class Answer:
  """A request as its client sees it."""

  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  reason: str = ""  # why it ended; "": in flight


@dataclasses.dataclass
class Progress:
  """How far the engines of a run have come, for the next one."""

  generation: int = 0
  epoch: int = 0
  first_step: int = 0

  def note(self, event: Event) -> None:
    """Takes an event of an engine into account."""
    if event["event"] == "step":
      self.first_step = event["step"] + 1
    if "epoch" in event:
      self.epoch = max(self.epoch, event["epoch"])
    if "generation" in event:
      self.generation = max(self.generation, event["generation"])


@dataclasses.dataclass
class Journal:
  """What a history says of its run."""

  answers: dict[str, Answer]
  progress: Progress
  last_s: float  # the last event's time
  down_s: float  # since it was written


def read_journal(
  path: pathlib.Path, requests: tuple[Request, ...]
) -> Journal | None:
  """The journal at `path`, cut to whole lines; None: nothing has begun.

  `requests` are those of the case.
  """
  down_s = max(time.time() - path.stat().st_mtime, 0.0)
  events = read_history(path, partial_ok=True)
  if not events or events[0]["event"] != "run":
    return None
  _cut(path)
  known = {r.request_id: r for r in requests}
  answers: dict[str, Answer] = {}
  progress = Progress()
  for event in events:
    progress.note(event)
    _take(event, answers, known)
  return Journal(answers, progress, float(events[-1]["t"]), down_s)


def _take(
  event: Event, answers: dict[str, Answer], known: dict[str, Request]
) -> None:
  """One event's part in what clients have seen."""
  kind = event["event"]
  if kind in ("accepted", "shed"):
    name = event["request_id"]
    answers[name] = Answer(_request(event, known))
    if kind == "shed":
      answers[name].reason = f"shed: {event['reason']}"
  elif kind == "step":
    for name, _, token in event["emitted"]:
      answers[name].tokens.append(token)
  elif kind == "finished":
    answers[event["request_id"]].reason = event["reason"]
  elif kind == "failed":
    answers[event["request_id"]].reason = f"failed: {event['reason']}"


def _request(event: Event, known: dict[str, Request]) -> Request:
  """A case's request, or a client's retry of one."""
  name = event["request_id"]
  if name in known:
    return known[name]
  root = known[name.partition("~")[0]]
  return dataclasses.replace(
    root, request_id=name, retry_of=event.get("retry_of"), arrival_step=0,
    arrival_s=None,
  )  # fmt: skip


def _cut(path: pathlib.Path) -> None:
  """Drops a last line that was not written to its end."""
  data = path.read_bytes()
  os.truncate(path, data.rfind(b"\n") + 1)
