"""Supervisor and launcher die: no request is lost, no token comes twice."""

import pathlib
import pickle
import signal
import subprocess
import sys
import time

import pytest

from resilient_moe.faults import Fault
from resilient_moe.report import read_history
from resilient_moe.report.history import of_kind
from tests.runtime.harness import Lab
from tests.runtime.process.harness import (
  LIMIT_S,
  Marked,
  Runs,
  at_most,
  kinds,
  process_case,
)

pytestmark = pytest.mark.slow

RUN = """
import pathlib, pickle, sys
from resilient_moe.runtime.gateway import run_case
case = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
run_case(case, pathlib.Path(sys.argv[2]))
"""


def test_a_supervisor_that_is_killed_is_replaced(lab: Lab, runs: Runs) -> None:
  """And a rank is lost before and after it; no fault strikes twice."""
  faults = (
    Fault("rank_lost", (1,), at_step=4),
    Fault("supervisor_lost", (), at_step=10),
    Fault("rank_lost", (2,), at_step=16),
  )
  events = runs(process_case(lab, "kv_restore", *faults))
  assert kinds(events, "fault", "kind") == [f.kind for f in faults]
  assert "SupervisorLost" in kinds(events, "failure", "kind")
  generations = set(kinds(events, "engine", "generation"))
  assert generations == {0, 1}
  # All ranks are there again, the lost one too.
  meshes = kinds(events, "epoch", "mesh")
  assert [0, 1, 2, 3] in meshes[1:]
  found = lab.verdict(events)
  assert (found["overall"], found["failed"]) == ("true", [])
  assert runs.marked.left() == []


def until_steps(partial: pathlib.Path, count: int) -> None:
  give_up = time.monotonic() + LIMIT_S
  while time.monotonic() < give_up:
    if partial.is_file() and partial.read_text().count('"step"') > count:
      return
    time.sleep(0.01)
  pytest.fail("it does not serve")


def test_a_launcher_that_is_killed_is_resumed_from_its_journal(
  lab: Lab, tmp_path: pathlib.Path, marked: Marked, runs: Runs
) -> None:
  case = process_case(lab, "kv_restore", Fault("rank_lost", (1,), at_step=4))
  file = tmp_path / "case"
  file.write_bytes(pickle.dumps(case))
  runs.folder.mkdir()
  partial = runs.folder / "history.jsonl.partial"
  with at_most(LIMIT_S, marked):
    launcher = subprocess.Popen(
      [sys.executable, "-c", RUN, str(file), str(runs.folder)]
    )
    until_steps(partial, 20)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert marked.left() == [], "who served has ended by itself"
  before = read_history(partial, partial_ok=True)
  assert not of_kind(before, "end")
  events = runs(case)
  assert events[: len(before)] == before, "nothing is told anew"
  assert any("journal" in text for text in kinds(events, "warning", "text"))
  found = lab.verdict(events)
  assert (found["overall"], found["failed"]) == ("true", [])
