"""Ready means: every program a recovery touches has run once, in peacetime."""

import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from resilient_moe.faults import scenario
from resilient_moe.report.history import of_kind
from resilient_moe.runtime import ahead
from resilient_moe.runtime.assemble import Fresh, plan_instance
from tests.runtime.drive import Driver
from tests.runtime.harness import (
  COMPILED,
  RANKS,
  Host,
  Lab,
  make_case,
  make_requests,
)

SINGLES = {frozenset({r}) for r in range(RANKS)}
PAUSE_S = 0.05  # between two steps, else a busy machine starves the compiler


def unready(
  lab: Lab, tmp_path: pathlib.Path, policy: str, **fields: Any
) -> Host:
  """A host that has programs of the full mesh only, and waits for none."""
  case = make_case(lab, policy, wait_ready=False, **fields)
  plans = plan_instance(case, Fresh())
  return Host(lab, case, scratch=lab.store_of_full_mesh(plans, tmp_path))


def test_meshes_become_ready_while_serving(
  lab: Lab, tmp_path: pathlib.Path
) -> None:
  """A process compiles; between steps each mesh's programs run once."""
  host = unready(lab, tmp_path, "mesh_shrink")
  _, backend = host.start()
  driver = Driver(backend)
  assert backend.view().ready == {frozenset()}
  served, give_up, before = 0, time.monotonic() + 200, len(COMPILED)
  while not backend.readiness.done and time.monotonic() < give_up:
    assert backend.poll() == ()
    if not driver.step():
      driver.accept(make_requests(n=6))
    served += 1
    time.sleep(PAUSE_S)
  assert backend.view().ready == {frozenset(), *SINGLES}
  assert served > 20, "it served meanwhile"
  assert len(COMPILED) == before, "the serving process compiled"
  said = of_kind(host.events, "mesh_ready")
  assert {frozenset(e["absent"]) for e in said} == SINGLES
  for rank in range(RANKS):
    left = tuple(r for r in range(RANKS) if r != rank)
    for width in backend.store.shape.chunks():
      assert backend.store.program(left, width)[1] == "warm"
  backend.close()


@pytest.mark.parametrize("rank", range(RANKS))
def test_no_recovery_on_a_ready_mesh_compiles(lab: Lab, rank: int) -> None:
  faults = scenario("rank_lost_decode", RANKS, at_step=8, rank=rank)
  host = Host(lab, make_case(lab, "kv_restore", faults))
  host.run()
  assert host.compiled == 0
  assert lab.verdict(host.events)["overall"] == "true"


def test_a_mesh_that_is_not_ready_still_serves(
  lab: Lab, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Its programs are compiled on the spot, and the outcome says so."""
  sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
  monkeypatch.setattr(
    ahead, "start", lambda *args: subprocess.Popen(sleep)
  )
  faults = scenario("rank_lost_decode", RANKS, at_step=8, rank=1)
  host = unready(lab, tmp_path, "mesh_shrink", faults=faults)
  host.run()
  assert lab.verdict(host.events)["overall"] == "true"
  fetched = [e for e in host.events if e.get("name") == "FetchExecutable"]
  assert [e["outcome"] for e in fetched] == ["compiled"]
  assert host.compiled
  compiler = host.backends[0].readiness._compiler
  assert compiler is not None
  assert compiler.poll() is not None, "left behind"


def test_making_a_mesh_ready_leaves_the_cache_alone(lab: Lab) -> None:
  _, backend = Host(lab, make_case(lab, "mesh_shrink")).start()
  driver = Driver(backend)
  driver.accept(make_requests(n=6))
  driver.step(8)
  read = lambda: [backend.store.read_row(r, 0, 20) for r in range(RANKS)]
  before = read()
  backend.wait_ready()
  np.testing.assert_array_equal(read(), before)
  while driver.step():
    pass
  backend.close()


def test_a_compiler_that_died_is_an_error(
  lab: Lab, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  die = [sys.executable, "-c", "raise SystemExit(3)"]
  monkeypatch.setattr(ahead, "start", lambda *args: subprocess.Popen(die))
  _, backend = unready(lab, tmp_path, "mesh_shrink").start()
  with pytest.raises(RuntimeError, match="ahead of time failed with status 3"):
    backend.wait_ready()
  backend.close()


def test_a_lost_rank_s_meshes_are_not_made_ready(
  lab: Lab, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
  monkeypatch.setattr(ahead, "start", lambda *args: subprocess.Popen(sleep))
  _, backend = unready(lab, tmp_path, "mesh_shrink").start()
  backend.readiness.drop_rank(1)
  assert [name for name, _ in backend.readiness._todo] == [frozenset({1})]
  backend.close()
