"""Cases with attention and experts apart, and what to look for in them."""

from typing import Any

from resilient_moe import faults as ft
from resilient_moe.report.history import of_kind
from resilient_moe.runtime.case import Case
from tests.runtime.harness import Event, Host, Lab, make_case

RANKS, ATTENTION = 6, 2
# A link is judged soon: nothing here is slow, or slow for long.
LINK_S = 0.06
QUICK = {"link_s": LINK_S}


def apart(
  lab: Lab, policy: str, faults: ft.Schedule = (), *, ranks: int = RANKS,
  attention: int = ATTENTION, **fields: Any,
) -> Case:  # fmt: skip
  """A small case, disaggregated."""
  return make_case(
    lab, policy, faults, deployment="disaggregated", ranks=ranks,
    attention=attention, **{"exchange": QUICK, **fields},
  )  # fmt: skip


def exact(lab: Lab, host: Host) -> None:
  """Everything that the checkers check, beside the collocated twin."""
  said = lab.verdict(host.events)
  assert said["overall"] == "true", said
  steps = [e["step"] for e in of_kind(host.events, "step")]
  assert len(steps) == len(set(steps)), "a step's number was used twice"


def lost(*ranks: int, at_step: int = 20, **fields: Any) -> ft.Fault:
  return ft.Fault("rank_lost", ranks, at_step=at_step, **fields)


def cut(attention: int, expert: int, at_step: int, **fields: Any) -> ft.Fault:
  return ft.Fault("link_cut", (attention, expert), at_step=at_step, **fields)


def names(events: list[Event], part: str | None = None) -> list[str]:
  """The actions of a run, or of all its resumes, or of all its repairs."""
  done = of_kind(events, "action")
  return [e["name"] for e in done if part in (None, e["part"])]


def failures(events: list[Event]) -> list[tuple[str, list[int]]]:
  return [(e["kind"], e["ranks"]) for e in of_kind(events, "failure")]


def home(events: list[Event]) -> dict[str, int]:
  """Request -> the rank that it was admitted to first."""
  first: dict[str, int] = {}
  for e in of_kind(events, "admitted"):
    first.setdefault(e["request_id"], e["rank"])
  return first
