"""Histories made by hand: a fleet of requests that decode in lock step.

Steps take `STEP_S`; request i has prompt [i, i, i] and its token at position
p is `token(i, p)`, so any two histories of the same requests agree unless a
test breaks one of them. All times are whole multiples of STEP_S after START_S,
so that the expected numbers can be counted by hand.
"""

import copy
import json
import pathlib
from typing import Any

from resilient_moe.report import History, verdict
from resilient_moe.report.history import Event

STEP_S = 0.125
START_S = 1.0
PROMPT = 3


def token(request: int, position: int) -> int:
  return (7 * request + position) % 256


class Builder:
  """Writes a history step by step; `now_s` is the virtual clock."""

  def __init__(self, policy: str = "mesh_shrink", **run: Any):
    self.history = History()
    self.now_s = 0.0
    self.step_number = 0
    self.epoch = 0
    self.emitted: dict[Any, int] = {}
    facts: dict[str, Any] = {
        "scenario": "one_rank",
        "runtime": "process",
        "deployment": "collocated",
        "seed": 0,
        "ranks": 4,
        "lossless": True,
        "fails_requests": False,
        "exact": True,
    }
    self.write("run", policy=policy, **(facts | run))
    self.write("epoch", epoch=0, mesh=[0, 1, 2, 3])
    self.now_s = START_S

  def write(self, event: str, **fields: Any) -> None:
    self.history.write(event, t=self.now_s, **fields)

  def accept(
      self, request: Any, retry_of: Any = None, prompt: int = -1
  ) -> None:
    number = request if prompt < 0 else prompt
    self.emitted[request] = 0
    self.write(
        "accepted",
        request_id=request,
        prompt_tokens=[number] * PROMPT,
        max_new_tokens=64,
        retry_of=retry_of,
    )
    self.write(
        "admitted", request_id=request, rank=0, row=0, step=self.step_number
    )

  def step(
      self, *requests: Any, seconds: float = STEP_S, like: int | None = None
  ) -> None:
    """One step that gives each request its next token."""
    self.now_s += seconds
    emitted = []
    for request in requests:
      position = PROMPT + self.emitted[request]
      self.emitted[request] += 1
      source = request if like is None else like
      emitted.append([request, position, token(source, position)])
    self.write(
        "step",
        step=self.step_number,
        epoch=self.epoch,
        bucket=0,
        seconds=seconds,
        prefill_tokens=0,
        emitted=emitted,
    )
    self.step_number += 1

  def finish(self, *requests: Any) -> None:
    for request in requests:
      count = self.emitted[request]
      self.write("finished", request_id=request, reason="length", tokens=count)

  def fault(self, *affected: Any, ranks: tuple[int, ...] = (3,)) -> None:
    self.write(
        "fault",
        kind="ranks_lost",
        ranks=ranks,
        phase="decode",
        step=self.step_number,
        affected=affected,
    )

  def detect(self, ranks: tuple[int, ...] = (3,)) -> None:
    self.write("failure", kind="RanksLost", ranks=ranks, epoch=self.epoch)

  def plan(self, *paused: Any) -> None:
    self.write(
        "plan",
        policy="mesh_shrink",
        epoch=self.epoch,
        resume=["shrink"],
        repair=[],
        paused=paused,
        seconds=0.0,
    )

  def bump(self) -> None:
    self.epoch += 1
    self.write("epoch", epoch=self.epoch, mesh=[0, 1, 2])

  def act(
      self, name: str, seconds: float, part: str = "resume", size: int = 0
  ) -> None:
    self.now_s += seconds
    self.write(
        "action",
        part=part,
        name=name,
        explain=name,
        seconds=seconds,
        bytes=size,
        outcome="done",
    )

  def end(self) -> list[Event]:
    self.write("end")
    return list(self.history)


def twin(**run: Any) -> list[Event]:
  """Requests 1 and 2, eight tokens each, no fault."""
  b = Builder("none", **run)
  b.accept(1)
  b.accept(2)
  for _ in range(8):
    b.step(1, 2)
  b.finish(1, 2)
  return b.end()


def recovered(policy: str = "mesh_shrink", **run: Any) -> list[Event]:
  """As the twin, but request 1 loses its rank after three tokens.

  Units of STEP_S from the fault, which strikes with the third token: 1
  detected, 2 planned, 3 and 5 actions done, 6 request 2 goes on, 7 request 1
  goes on too, 9 redundant again.
  """
  b = Builder(policy, **run)
  b.accept(1)
  b.accept(2)
  for _ in range(3):
    b.step(1, 2)
  b.fault(1)
  b.now_s += STEP_S
  b.detect()
  b.now_s += STEP_S
  b.plan(1, 2)
  b.bump()
  b.act("RebuildMesh", STEP_S)
  b.act("CopyExperts", 2 * STEP_S, size=1000)
  b.write(
      "requests_moved", kind="recompute", request_ids=[1], tokens=6, bytes=0
  )
  b.write("resumed", epoch=1, paused=[1, 2])
  b.step(2)
  b.step(1, 2)
  b.step(1, 2)
  b.act("CopyExperts", STEP_S, part="repair", size=500)
  b.write("redundancy", full=True, epoch=1)
  b.step(1, 2)
  b.step(1, 2)
  b.step(1)
  b.finish(1, 2)
  return b.end()


def retried() -> list[Event]:
  """Request 1 fails after three tokens; its client sends it again as "1b"."""
  b = Builder("retry", fails_requests=True)
  b.accept(1)
  b.accept(2)
  for _ in range(3):
    b.step(1, 2)
  b.fault(1)
  b.write("failed", request_id=1, reason="its rank was lost")
  b.accept("1b", retry_of=1, prompt=1)
  for _ in range(5):
    b.step("1b", like=1)
  for _ in range(3):
    b.step("1b", like=1)
  for _ in range(5):
    b.step(2)
  b.finish("1b", 2)
  return b.end()


def without(events: list[Event], kind: str) -> list[Event]:
  return [event for event in events if event["event"] != kind]


def edited(events: list[Event], kind: str, nth: int, **fields: Any) -> Any:
  """A copy with fields of the nth event of a kind changed."""
  changed = copy.deepcopy(events)
  found = [event for event in changed if event["event"] == kind]
  found[nth].update(fields)
  return changed


def store(
    folder: pathlib.Path, events: list[Event], quiet: list[Event] | None
) -> None:
  """Lays a run down as a launcher does."""
  run = events[0]
  place = folder / run["scenario"] / run["policy"] / f"seed{run['seed']}"
  place.mkdir(parents=True)
  lines = "".join(json.dumps(event) + "\n" for event in events)
  (place / "history.jsonl").write_text(lines)
  (place / "verdict.json").write_text(json.dumps(verdict(events, quiet)))
