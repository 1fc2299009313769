"""Real engines in processes of their own, behind the gateway. Few: slow."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import time
from typing import Any

import pytest

from resilient_moe.faults import parse_schedule
from resilient_moe.report import read_history, verdict
from resilient_moe.report.history import of_kind
from resilient_moe.runtime import gateway
from resilient_moe.runtime.case import Case, RunFailed
from resilient_moe.serving.request import Request
from tests.runtime.harness import Lab, make_case, make_requests

Event = dict[str, Any]


def tiny(lab: Lab, policy: str, at_step: int | None = None) -> Case:
  """Two ranks, of which the second is lost."""
  fault = {"kind": "rank_lost", "ranks": [1], "at_step": at_step}
  return make_case(
    lab, policy, ranks=2, requests=make_requests(n=8, new_tokens=12)[:4],
    faults=parse_schedule([fault] if at_step is not None else [], 2),
    wait_ready=policy == "restart_cached",
  )  # fmt: skip


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
  """Every engine process that the gateway starts."""
  started: list[subprocess.Popen] = []
  real = subprocess.Popen

  def popen(*args: Any, **kwargs: Any) -> subprocess.Popen:
    started.append(real(*args, **kwargs))
    return started[-1]

  monkeypatch.setattr("resilient_moe.runtime.gateway.subprocess.Popen", popen)
  return started


def left_behind(folder: pathlib.Path) -> list[str]:
  """Command lines of live processes that work in this folder."""
  found = []
  for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      line = entry.read_bytes().replace(b"\0", b" ").decode()
    except OSError:
      continue
    if str(folder) in line:
      found.append(line)
  return found


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["restart", "restart_cached"])
def test_a_restart_is_another_process(
  lab: Lab, tmp_path: pathlib.Path, engines: list[subprocess.Popen],
  policy: str,
) -> None:  # fmt: skip
  """It loads what is stored, or compiles in a store of its own."""
  stores: dict[str, dict[str, float]] = {}

  def progress(event: Event) -> None:
    if event["event"] in ("fault", "resumed"):
      files = (tmp_path / "scratch").glob("*/step*")
      stores[event["event"]] = {
        f"{f.parent.name}/{f.name}": f.stat().st_mtime for f in files
      }

  gateway.run_case(tiny(lab, policy, at_step=6), tmp_path, progress)
  events = read_history(tmp_path / "history.jsonl")
  assert verdict(events)["failed"] == ["exactness"], "no twin here"
  assert len({engine.pid for engine in engines}) == 2
  assert engines[0].poll() == 0, "the old one ended by itself"
  assert engines[1].poll() is not None
  stages = of_kind(events, "engine")
  assert {e["generation"] for e in stages} == {0, 1}
  done = [e for e in of_kind(events, "action") if e["part"] == "resume"]
  assert done[-1]["name"] == "RestartInstance"
  new = stores["resumed"].items() - stores["fault"].items()
  if policy == "restart":
    assert {n for n, _ in new} == {"cold1/step0x1", "cold1/step16x1"}
    assert done[-1]["outcome"] == "compiled"
  else:
    assert not new, "it compiled what was stored"
    assert done[-1]["outcome"] == "stored"
  assert not (tmp_path / "scratch").exists()
  assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_clients_send_failed_requests_again_and_long_ones_are_refused(
  lab: Lab, tmp_path: pathlib.Path
) -> None:
  case = tiny(lab, "retry", at_step=6)
  long = Request("long", tuple(range(60)), max_new_tokens=60)
  case = dataclasses.replace(case, requests=(*case.requests, long))
  gateway.run_case(case, tmp_path)
  events = read_history(tmp_path / "history.jsonl")
  assert verdict(events)["failed"] == ["exactness"], "no twin here"
  failed = [e["request_id"] for e in of_kind(events, "failed")]
  assert failed
  again = {
    e["request_id"]: e["retry_of"]
    for e in of_kind(events, "accepted") if e["retry_of"]
  }  # fmt: skip
  assert list(again.values()) == failed
  reasons = {e["request_id"]: e["reason"] for e in of_kind(events, "finished")}
  assert all(reasons[name] == "length" for name in again)
  (shed,) = of_kind(events, "shed")
  assert shed["request_id"] == "long"
  assert "60 prompt + 60 new" in shed["reason"]
  assert "96 positions" in shed["reason"]
  lines = (tmp_path / "outputs.jsonl").read_text().splitlines()
  said = {o["request_id"]: o for o in map(json.loads, lines)}
  assert said["long"]["finish_reason"].startswith("shed: ")
  assert said[failed[0]]["finish_reason"] == "failed: rank lost"
  assert len(said[next(iter(again))]["output_tokens"]) >= 12


@pytest.mark.slow
def test_an_engine_that_is_killed_fails_the_run_by_name(
  lab: Lab, tmp_path: pathlib.Path, engines: list[subprocess.Popen]
) -> None:
  """Killed while its compiler is at work: that one goes too."""
  alive: list[str] = []

  def progress(event: Event) -> None:
    if event["event"] == "step" and not alive:
      alive.extend(left_behind(tmp_path))
      os.kill(engines[0].pid, signal.SIGKILL)

  with pytest.raises(RunFailed, match="policy 'mesh_shrink' ended with.* -9"):
    gateway.run_case(tiny(lab, "mesh_shrink"), tmp_path, progress)
  assert any("resilient_moe.runtime.ahead" in line for line in alive)
  give_up = time.monotonic() + 3  # the dying takes a moment
  while left_behind(tmp_path) and time.monotonic() < give_up:
    time.sleep(0.05)
  assert left_behind(tmp_path) == []
  assert engines[0].poll() == -signal.SIGKILL
  assert not (tmp_path / "history.jsonl").exists()
  assert not (tmp_path / "outputs.jsonl").exists()


@pytest.mark.slow
def test_what_the_engine_refuses_reaches_the_caller(
  lab: Lab, tmp_path: pathlib.Path
) -> None:
  case = dataclasses.replace(
    tiny(lab, "none"), checkpoint=str(tmp_path / "nowhere")
  )
  with pytest.raises(RunFailed, match="nowhere: no checkpoint there"):
    gateway.run_case(case, tmp_path / "run")


def test_an_unknown_policy_names_the_choices(
  lab: Lab, tmp_path: pathlib.Path, engines: list[subprocess.Popen]
) -> None:
  with pytest.raises(ValueError, match="unknown policy 'hope'.*kv_restore"):
    gateway.run_case(tiny(lab, "hope"), tmp_path)
  assert engines == []


@pytest.mark.parametrize(
  ("field", "value", "choices"),
  [
    ("runtime", "cloud", "emulated, logical"),
    ("deployment", "scattered", "collocated"),
    ("ranks", 0, "at least 1"),
  ],
)
def test_a_bad_case_names_the_choices(
  lab: Lab, field: str, value: Any, choices: str
) -> None:
  with pytest.raises(ValueError, match=f"{field}={value!r}: .*{choices}"):
    dataclasses.replace(make_case(lab, "none"), **{field: value})
