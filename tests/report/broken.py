"""Broken histories: by name, the checker that must object and the change."""

import copy
from collections.abc import Callable
from typing import Any

from resilient_moe.report.history import Event, RequestId, of_kind
from tests.report import synthetic as s

Change = Callable[[list[Event]], list[Event]]


def insert(kind: str, after: str, **fields: Any) -> Change:
  """Adds an event after the first of kind `after`."""

  def change(events: list[Event]) -> list[Event]:
    at = [e["event"] for e in events].index(after) + 1
    event = {"event": kind, "t": events[at - 1]["t"], **fields}
    return [*events[:at], event, *events[at:]]

  return change


def drop(kind: str, nth: int) -> Change:
  """Removes the nth event of a kind."""

  def change(events: list[Event]) -> list[Event]:
    gone = of_kind(events, kind)[nth]
    return [event for event in events if event is not gone]

  return change


def edit(kind: str, nth: int, **fields: Any) -> Change:
  """Changes fields of the nth event of a kind."""
  return lambda events: s.edited(events, kind, nth, **fields)


def swap(first: str, second: str) -> Change:
  """Moves the first event of a kind to just after the last of another."""

  def change(events: list[Event]) -> list[Event]:
    moved = of_kind(events, first)[0]
    rest = [event for event in events if event is not moved]
    at = max(i for i, e in enumerate(rest) if e["event"] == second)
    return [*rest[: at + 1], moved, *rest[at + 1 :]]

  return change


def _finished(request_id: RequestId, tokens: int = 0) -> dict[str, Any]:
  return {"request_id": request_id, "reason": "length", "tokens": tokens}


BROKEN: dict[str, tuple[str, Change]] = {
    "lost": ("accounting", drop("finished", 0)),
    "answered twice": (
        "accounting",
        insert("finished", "finished", **_finished(1, 8)),
    ),
    "accepted twice": (
        "accounting",
        insert(
            "accepted",
            "accepted",
            request_id=1,
            prompt_tokens=[1, 1, 1],
            max_new_tokens=1,
        ),
    ),
    "answer to nobody": (
        "accounting",
        insert("finished", "finished", **_finished("ghost")),
    ),
    "token for nobody": (
        "accounting",
        edit("step", 0, emitted=[[1, 3, 10], [2, 3, 17], ["ghost", 3, 1]]),
    ),
    "token after the end": ("accounting", swap("step", "finished")),
    "failed": (
        "accounting",
        lambda e: [
            {**x, "event": "failed", "reason": "rank"}
            if x["event"] == "finished"
            else x
            for x in e
        ],
    ),
    "no reason": ("accounting", edit("finished", 0, reason="")),
    "retry of nobody": ("accounting", edit("accepted", 1, retry_of="ghost")),
    "emitted twice": (
        "immutability",
        edit("step", 1, emitted=[[1, 3, 10], [2, 4, 18]]),
    ),
    "changed": (
        "immutability",
        edit("step", 1, emitted=[[1, 3, 11], [2, 4, 18]]),
    ),
    "gap": ("immutability", edit("step", 1, emitted=[[1, 5, 12], [2, 4, 18]])),
    "not from the prompt": (
        "immutability",
        edit("step", 0, emitted=[[1, 0, 10], [2, 3, 17]]),
    ),
    "count is wrong": ("immutability", edit("finished", 0, tokens=9)),
    "another token": (
        "exactness",
        edit("step", 6, emitted=[[1, 8, 99], [2, 9, 23]]),
    ),
    "epoch repeated": ("epochs_monotone", edit("epoch", 1, epoch=0)),
    "step of an old epoch": ("epochs_monotone", edit("step", 6, epoch=0)),
    "stale tokens": ("fencing", edit("step", 3, epoch=0)),
    "no end": ("completeness", drop("end", 0)),
    "two ends": ("completeness", insert("end", "step")),
    "end too early": ("completeness", swap("finished", "end")),
    "no run": ("completeness", drop("run", 0)),
    "two runs": (
        "completeness",
        lambda e: [e[0], copy.deepcopy(e[0]), *e[1:]],
    ),
    "the fault missed": (
        "completeness",
        lambda e: s.without(s.edited(e, "run", 0, expected_faults=1), "fault"),
    ),
}
