"""Simulated runs: every policy, scenario and timing, judged by all checkers."""

import ast
import collections
import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.faults import (
  PROCESS_KINDS,
  Fault,
  scenario,
  scenario_names,
)
from resilient_moe.report import HistoryWriter, verdict
from resilient_moe.report.history import of_kind
from resilient_moe.serving.recover import Unrecoverable
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.run import Run
from tests.sim import still
from tests.sim.still import BUSY, STILL, Fixed, case, simulate

SIM = pathlib.Path(still.__file__).parents[2] / "resilient_moe" / "sim"
RUNS = 60  # of each deployment
RANKS, ATTENTION = 6, 2
LOST = Fault("rank_lost", (1,), at_step=12)
NEEDS = {"killed_again_and_again", "killed_twenty_times"}  # replacements
NEEDS.add("killed_twenty_times_apart")


def names(attention: int) -> list[str]:
  """Scenarios that need no real process, and end within a short run."""
  return [
    name for name in scenario_names(attention)
    if name not in NEEDS and not {
      f.kind for f in scenario(name, RANKS, attention=attention and 3)
    } & set(PROCESS_KINDS)
  ]  # fmt: skip


def timing(rng: np.random.Generator) -> Fixed:
  """Every wait anything from nothing to a few steps."""
  odd = {
    f.name: float(rng.choice([0.0, rng.exponential(0.01)]))
    for f in dataclasses.fields(Fixed)
    if f.name not in ("step", "struck", "behind", "note")
  }
  struck = None if rng.random() < 0.7 else float(rng.random())
  return Fixed(
    step=0.01, struck=struck, behind=bool(rng.random() < 0.5), **odd
  )


def drawn(rng: np.random.Generator, attention: int) -> Any:
  """A case of a drawn policy, scenario and seed."""
  while True:
    deployment = "disaggregated" if attention else "collocated"
    policy = str(rng.choice(rm.policy_names()))
    name = str(rng.choice(names(attention)))
    seed, at_step = int(rng.integers(1000)), int(rng.integers(1, 30))
    if deployment not in rm.load(policy).deployments:
      continue
    try:
      faults = scenario(
        name, RANKS, seed, at_step=at_step, attention=attention
      )
    except ValueError:  # too few of a role
      continue
    return case(
      policy, faults, scenario=name, seed=seed, deployment=deployment,
      ranks=RANKS, attention=attention,
      wait_ready=bool(rng.random() < 0.5),
    )  # fmt: skip


TWIN = simulate(case("none"), STILL)


def judged(made: Any, events: list) -> dict[str, Any]:
  run, *rest = TWIN
  return verdict(events, [{**run, "seed": made.seed}, *rest])


@pytest.mark.parametrize("attention", [0, ATTENTION, 3])
def test_whatever_happens_when_the_checkers_are_satisfied(
  attention: int, rng: np.random.Generator
) -> None:
  ends: collections.Counter[str] = collections.Counter()
  for _ in range(RUNS):
    made, times = drawn(rng, attention), timing(rng)
    about = f"{made.name}, {made.scenario}, seed {made.seed}, {times}"
    try:
      events = list(simulate(made, times))
    except Unrecoverable:
      ends["unrecoverable"] += 1
      continue
    said = judged(made, events)
    rest = [n for n in said["failed"] if n != "completeness"]
    assert rest == [], (about, said["checkers"])
    assert of_kind(events, "warning") == [], about
    ends[said["overall"]] += 1
  # A short run may end before a late fault comes; most have it.
  assert ends["true"] > 0.6 * RUNS, ends


@pytest.mark.parametrize("attention", [0, 3])
def test_equal_seeds_have_equal_histories(
  tmp_path: pathlib.Path, attention: int
) -> None:
  deployment = "disaggregated" if attention else "collocated"
  texts = []
  for number in range(2):
    clock, file = VirtualClock(), tmp_path / f"{number}.jsonl"
    faults = scenario(
      "one_after_another", RANKS, 5, at_step=8, attention=attention
    )
    made = case(
      "tarragon" if attention else "restart_cached", faults,
      deployment=deployment, ranks=RANKS, attention=attention,
    )  # fmt: skip
    with HistoryWriter(file, clock.now) as history:
      Run(made, BUSY, clock, history).run()
    texts.append(file.read_bytes())
  assert texts[0] == texts[1]
  assert texts[0].count(b"\n") > 100


def test_the_simulation_knows_no_other_time_than_its_own() -> None:
  for file in sorted(SIM.glob("*.py")):
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Import):
        found = {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        found = {str(node.module)}
      else:
        continue
      assert not found & {"time", "datetime"}, f"{file.name}: {found}"


def of(events: list, kind: str) -> dict[str, Any]:
  (event,) = of_kind(events, kind)
  return event


def test_a_loss_is_known_when_it_is_detected() -> None:
  """The step that it struck ends for the others only then."""
  times = Fixed(step=1.0, detect=0.7, struck=0.25)
  events = list(simulate(case("mesh_shrink", (LOST,)), times))
  fault, failed = of(events, "fault"), of(events, "step_failed")
  before = [e for e in of_kind(events, "step") if e["t"] <= fault["t"]]
  assert fault["t"] == pytest.approx(before[-1]["t"] + 0.25)
  assert failed["t"] == pytest.approx(fault["t"] + 0.7)
  assert of(events, "failure")["t"] == failed["t"]


def test_a_policy_and_its_actions_take_their_time() -> None:
  times = Fixed(step=1.0, plan=0.5, act=0.125)
  events = list(simulate(case("mesh_shrink", (LOST,)), times))
  failure, plan = of(events, "failure"), of(events, "plan")
  assert plan["t"] == pytest.approx(failure["t"] + 0.5)
  done = [e for e in of_kind(events, "action") if e["part"] == "resume"]
  executed = [e for e in done if e["name"] not in ("Requeue", "FailRequests")]
  assert of(events, "resumed")["t"] == pytest.approx(
    plan["t"] + 0.125 * len(executed)
  )
  assert {e["seconds"] for e in executed} == {0.125}


@pytest.mark.parametrize(("lag", "steps"), [(0.0, 0), (0.5, 0), (2.5, 2)])
def test_what_checkpoints_trail_by_is_decoded_again(
  lag: float, steps: int
) -> None:
  events = list(
    simulate(case("kv_restore", (LOST,)), Fixed(step=1.0, lag=lag))
  )
  moved = of(events, "requests_moved")
  assert moved["kind"] == "restore"
  assert moved["tokens"] == steps * len(moved["request_ids"])


def test_a_restart_takes_its_stages_and_keeps_the_tokens() -> None:
  made = case("restart_cached", (LOST,))
  events = list(simulate(made, Fixed(step=1.0, begin=9.0)))
  action = next(e for e in of_kind(events, "action")
                if e["name"] == "RestartInstance")  # fmt: skip
  assert action["seconds"] == pytest.approx(9.0)
  assert {e["generation"] for e in of_kind(events, "engine")} == {0, 1}
  assert of_kind(events, "requests_moved")[0]["tokens"] > 0
  assert judged(made, events)["overall"] == "true"


def test_others_step_on_while_an_action_is_waited_for() -> None:
  made = case(
    "kv_restore", (LOST,), deployment="disaggregated", ranks=RANKS,
    attention=ATTENTION,
  )  # fmt: skip
  events = list(simulate(made, Fixed(step=1.0, act=3.0)))
  start, end = of(events, "plan")["t"], of(events, "resumed")["t"]
  meanwhile = [e for e in of_kind(events, "step") if start < e["t"] < end]
  assert {tuple(e["domain"]) for e in meanwhile} == {(0,)}
  assert len(meanwhile) >= int((end - start) / 1.0) - 1


def test_replacements_start_and_get_ready_behind_traffic() -> None:
  times = Fixed(step=0.1, launch=1.55, ready=0.75, behind=True)
  made = case("kv_restore", (LOST,), kwargs={"replace": True})
  events = list(simulate(made, times))
  done = {e["name"]: e for e in of_kind(events, "action")}
  launched, joined = done["LaunchRank"]["t"], done["Rejoin"]["t"]
  assert joined >= launched + 1.55 + 0.75
  steps = [e for e in of_kind(events, "step") if launched < e["t"] < joined]
  assert len(steps) >= 8
  full = next(e for e in of_kind(events, "mesh_ready")
              if e["t"] > launched and not e["absent"])  # fmt: skip
  assert launched + 1.55 < full["t"] <= joined


def test_requests_that_come_by_the_clock_come_then() -> None:
  timed = tuple(
    dataclasses.replace(r, arrival_step=None, arrival_s=7.25 * i)
    for i, r in enumerate(still.requests(4, new_tokens=3))
  )
  events = list(simulate(case("none", requests=timed), Fixed(step=0.01)))
  accepted = [e["t"] for e in of_kind(events, "accepted")]
  assert accepted == [0.0, 7.25, 14.5, 21.75]


def test_who_can_not_be_served_is_shed_with_the_reason() -> None:
  long = still.Request("long", tuple(range(90)), 50)
  made = case("none", requests=(*still.requests(2), long))
  events = list(simulate(made))
  assert "longer than the cache" in of(events, "shed")["reason"]


def test_a_link_that_nobody_can_do_without_ends_the_run() -> None:
  cut = Fault("link_cut", (0, 2), at_step=10)
  made = case("none", (cut,), deployment="disaggregated", ranks=RANKS,
              attention=ATTENTION)  # fmt: skip
  with pytest.raises(Unrecoverable, match="the loss of the link .0, 2."):
    simulate(made, Fixed(step=0.01, link=0.5))
