"""Timing that is fitted to histories: it finds what they were made with."""

import dataclasses
import pathlib

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.faults import Fault
from resilient_moe.report import Event
from resilient_moe.sim import fit as fit_lib
from resilient_moe.sim.fitted import ActionFit, Fitted
from tests.sim.still import Fixed, case, simulate

KNOWN = Fixed(
  step=0.012, turn_s=0.0005, act=0.004, plan=0.002, detect=0.03, struck=0.5,
  lag=0.03, launch=0.4, ready=0.25, begin=2.5,
)  # fmt: skip


def runs(timing: Fixed = KNOWN) -> list[list[Event]]:
  """Histories of known timing."""
  found = []
  for at_step, policy, kwargs in (
    (12, "kv_restore", {"replace": True}), (14, "mesh_shrink", {}),
    (16, "restart_cached", {}),
  ):  # fmt: skip
    lost = Fault("rank_lost", (1,), at_step=at_step)
    found.append(list(simulate(case(policy, (lost,), kwargs=kwargs), timing)))
  return found


@pytest.fixture(scope="module")
def fitted() -> Fitted:
  return fit_lib.fit(runs(), "nobody")


def test_the_numbers_are_those_of_the_runs(fitted: Fitted) -> None:
  close = pytest.approx
  for line in (fitted.decode, fitted.prefill):
    assert line.seconds(4, 8, 16) == close(0.012, rel=0.01)
  assert fitted.turn_s == close(0.0005, rel=0.01)
  assert fitted.plan["*"] == close(0.002, rel=0.01)
  assert fitted.detect["rank_lost"] == close((0.03,) * 3)
  assert fitted.struck == close(0.5, abs=0.02)
  assert fitted.actions["RebuildMesh"].fixed == close(0.004, rel=0.05)
  assert fitted.actions["FetchExecutable/warm"].fixed == close(0.004, rel=0.05)
  assert fitted.mesh_ready == close(0.25, rel=0.05)
  assert fitted.launch == 0.0, "only processes are waited for"
  assert dict(fitted.starts["stored"])["start"] == close(2.5)
  assert dict(fitted.starts["first"]) == {"start": 2.5}
  assert fitted.after_resume == close((0.0, 0.0), abs=1e-3)


def test_what_was_not_seen_is_taken_from_other_runs() -> None:
  lost = Fault("rank_lost", (1,), at_step=14)
  few = fit_lib.fit([list(simulate(case("mesh_shrink", (lost,)), KNOWN))], "x")
  slow = fit_lib.fit(runs(dataclasses.replace(KNOWN, act=0.4)), "y")
  both = few.with_rest_of(slow)
  assert both.actions["RebuildMesh"].fixed == pytest.approx(0.004, rel=0.05)
  assert both.actions["RestoreKV"].fixed == pytest.approx(0.4, rel=0.05)
  assert both.decode == few.decode
  assert "RestoreKV" in both.note
  assert "by 3 other runs" in both.note


def test_what_was_fitted_gives_the_same_stalls(fitted: Fitted) -> None:
  """Simulated again with the fitted numbers, all ends when it ended."""
  fields = dataclasses.asdict(KNOWN)
  assert fields["note"] != fitted.note
  lost = Fault("rank_lost", (1,), at_step=13)
  made = case("mesh_shrink", (lost,))
  real = list(simulate(made, KNOWN))
  ours = list(simulate(made, fitted))
  assert ours[-1]["t"] == pytest.approx(real[-1]["t"], rel=0.02)


def test_steps_are_a_line_in_what_they_compute() -> None:
  rng = np.random.default_rng(0)
  x = np.column_stack([np.ones(200), rng.integers(0, 30, 200)])
  y = x @ [0.01, 0.0002]
  y[::10] += 0.5  # somebody else had the machine
  assert fit_lib.robust(x, y) == pytest.approx([0.01, 0.0002], rel=1e-3)


def test_a_calibration_goes_into_a_file_and_back(
  fitted: Fitted, tmp_path: pathlib.Path
) -> None:
  file = tmp_path / "mine.json"
  file.write_text(fitted.to_json())
  again = Fitted.read(str(file))
  assert again.to_json() == fitted.to_json()
  assert "3 simulated runs" in again.note
  assert "ranks 3 to 4" in again.note


def test_programs_that_are_not_warm_cost_what_others_did(
  fitted: Fitted,
) -> None:
  """On processes a mesh that was just compiled says that it was stored."""
  cold = ActionFit(4.5)
  known = {**fitted.actions, "FetchExecutable/stored": cold}
  known = dataclasses.replace(fitted, actions=known)
  view = rm.bare_view(4, 8)
  asked = rm.FetchExecutable(frozenset({1, 2}))
  assert known.action(asked, view, ()).seconds == 4.5
  warm = dataclasses.replace(view, ready=frozenset({frozenset({1, 2})}))
  assert known.action(asked, warm, ()).seconds < 0.01
  # Where none was ever cold: as a mesh that is made ready in peacetime.
  assert fitted.action(asked, view, ()).seconds == fitted.mesh_ready > 0.2


@pytest.mark.parametrize(
  ("text", "match"),
  [
    (None, "No such file"), ("[", "JSONDecodeError"), ("{}", "KeyError"),
    ('{"about": 3}', "about is no table"),
  ],
)  # fmt: skip
def test_what_is_no_calibration_is_refused(
  tmp_path: pathlib.Path, text: str | None, match: str
) -> None:
  file = tmp_path / "x.json"
  if text is not None:
    file.write_text(text)
  with pytest.raises(ValueError, match=match):
    Fitted.read(str(file))


def test_runs_of_one_kind_are_needed() -> None:
  mixed = runs()
  mixed[0][0]["runtime"] = "process"
  with pytest.raises(ValueError, match="runs of 2 kinds"):
    fit_lib.fit(mixed, "nobody")
  with pytest.raises(ValueError, match="at least 50"):
    fit_lib.fit([runs()[0][:20]], "nobody")
