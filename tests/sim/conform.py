"""Is a simulated run the same story as a real one: events, plans and views?

Both are indexed by step: on the emulated runtime all meshes are ready before
the first step (`wait_ready`), a checkpoint is drained before anybody looks at
it, so that it has what the last committed step has, and nothing decides by
seconds; `SimulatedCase.by_step` is the same rule. What is compared: every
event with all its fields but times, bytes and token ids, and the view before
each plan and after each action, requests included.
"""

import dataclasses
import itertools
from typing import Any

import pytest

from experiments.simulated import simulated_case
from resilient_moe import recovery as rm
from resilient_moe.faults import Schedule
from resilient_moe.runtime.case import Case
from resilient_moe.serving import recover
from tests.runtime.watch import differences, world
from tests.sim.still import Fixed, simulate

Event = dict[str, Any]
QUICK = Fixed(step=1e-4)  # no deadline passes before it is kept
# What a simulation tells of in another way, or not at all: how an engine
# starts, what was compiled where, what went over links.
LEFT_OUT = {
  "run", "engine", "prepare", "mesh_ready", "checkpoint", "exchange", "healed",
  "warning", "end",
}  # fmt: skip
TIMES_AND_BYTES = {"t", "seconds", "bytes", "outcome", "tier"}


def projected(events: list[Event], apart: bool) -> list[Event]:
  """The events without what only a clock or a real model can say.

  `apart`: an expert rank is struck in the step of whoever sends it a parcel
  first, which is for the router to say; the simulator has none.
  """
  found = []
  for event in events:
    by_the_gateway = event["event"] == "requests_moved" and "to" not in event
    if event["event"] in LEFT_OUT or by_the_gateway:
      continue  # the test's host has no gateway
    kept = {k: v for k, v in event.items() if k not in TIMES_AND_BYTES}
    if apart and event["event"] == "fault":
      kept = {k: v for k, v in kept.items() if k not in ("step", "phase")}
    if "emitted" in kept:
      kept["emitted"] = [(name, at) for name, at, _ in kept["emitted"]]
    found.append(kept)
  return found


class Seen:
  """The views that policies saw, and those after each action."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
    self.views: list[tuple[str, rm.ClusterView]] = []
    self._carry_out = recover.carry_out
    self._checked = recover.recover_checked
    monkeypatch.setattr(recover, "carry_out", self._carried)
    monkeypatch.setattr(recover, "recover_checked", self._asked)

  def _carried(
    self, action: rm.Action, current: Any, backend: Any, record: Any
  ) -> Any:
    outcome = self._carry_out(action, current, backend, record)
    after = f"after {type(action).__name__}"
    self.views.append((after, world(backend, current.state)))
    return outcome

  def _asked(
    self, policy: rm.RecoveryPolicy, view: rm.ClusterView, failure: rm.Failure
  ) -> Any:
    self.views.append((f"asked about {failure}", view))
    return self._checked(policy, view, failure)

  def take(self) -> list[tuple[str, rm.ClusterView]]:
    views, self.views = self.views, []
    return views


def indexed(faults: Schedule, events: list[Event]) -> Schedule:
  """The faults that struck, each at the step in which it really did.

  Where roles are apart a loss waits for a step that uses the rank; which do is
  the router's choice, and no simulation knows it.
  """
  struck = [e for e in events if e["event"] == "fault"]
  found = list(faults)
  for number, fault in enumerate(faults):
    event = next((e for e in struck if e["kind"] == fault.kind
                  and set(e["ranks"]) <= set(fault.ranks)), None)  # fmt: skip
    if event is None:
      continue
    struck.remove(event)
    if fault.at_step is not None and event["phase"] != "recovery":
      found[number] = dataclasses.replace(
        fault, at_step=event["step"], phase="any"
      )
  return tuple(found)


def unlike(case: Case, events: list[Event], seen: Seen) -> list[str]:
  """Where the same case, simulated, is another story; [] if nowhere."""
  real_views = seen.take()
  made = dataclasses.replace(
    simulated_case(case), by_step=True, faults=indexed(case.faults, events)
  )
  apart = case.deployment == "disaggregated"
  ours = projected(list(simulate(made, QUICK)), apart)
  theirs = projected(events, apart)
  for number, pair in enumerate(itertools.zip_longest(theirs, ours)):
    if pair[0] != pair[1]:
      return [f"event {number}: is {pair[0]}, simulated {pair[1]}"]
  views = seen.take()
  if len(views) != len(real_views):
    return [f"{len(real_views)} views, simulated {len(views)}"]
  found = []
  for (what, real), (said, ours_) in zip(real_views, views, strict=True):
    lines = differences(real, ours_)
    if what != said or lines:
      found.append(f"{what} (simulated: {said}): {lines}")
  return found

