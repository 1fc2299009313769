"""A sweep skips what is finished, goes on, and mixes nothing."""

import json

import pytest

from experiments import cases, settings, sweep
from tests.experiments.run_fake import FakeGateway, tiny


@pytest.fixture
def gateway():
  return FakeGateway()


def _run(tmp_path, gateway, **changes):
  """Runs what is pending of a config; returns (policy, seed) of what ran."""
  chosen = settings.read(tiny(tmp_path, **changes))
  jobs = cases.jobs(chosen)
  workdir = tmp_path / "out"
  todo = sweep.pending(workdir, chosen, jobs)
  sweep.start(workdir, chosen, {"command": "c"})
  before = len(gateway.ran)
  for job in todo:
    sweep.run(job, workdir, gateway, lambda event: None)
  return [(policy, seed) for _, policy, seed in gateway.ran[before:]]


def _verdict(tmp_path, policy):
  place = tmp_path / "out" / "rank_lost_decode" / policy / "seed0"
  return json.loads((place / "verdict.json").read_text())


def test_a_run_leaves_its_files_and_a_true_verdict(tmp_path, gateway):
  _run(tmp_path, gateway)
  place = tmp_path / "out" / "rank_lost_decode" / "kv_restore" / "seed0"
  assert {file.name for file in place.iterdir()} == {
    "case.json",
    "history.jsonl",
    "outputs.jsonl",
    "verdict.json",
  }
  verdict = _verdict(tmp_path, "kv_restore")
  assert verdict["overall"] == "true", verdict
  assert verdict["checkers"]["exactness"]["value"] == "true"


def test_a_finished_run_is_skipped(tmp_path, gateway):
  assert len(_run(tmp_path, gateway)) == 3
  assert _run(tmp_path, gateway) == []


def test_more_policies_and_seeds_are_added_to_what_is_there(tmp_path, gateway):
  _run(tmp_path, gateway, policies="mesh_shrink")
  added = _run(tmp_path, gateway, policies="retry,mesh_shrink", seeds="0,1")
  assert added == [("retry", 0), ("none", 1), ("retry", 1), ("mesh_shrink", 1)]


def test_an_interrupted_sweep_goes_on(tmp_path, gateway):
  gateway.interrupt = "mesh_shrink"
  with pytest.raises(KeyboardInterrupt):
    _run(tmp_path, gateway)
  gateway.interrupt = ""
  assert _run(tmp_path, gateway) == [("mesh_shrink", 0), ("kv_restore", 0)]
  place = tmp_path / "out" / "rank_lost_decode" / "mesh_shrink" / "seed0"
  assert not (place / "history.jsonl.partial").exists()


def test_a_failed_run_is_recorded_and_tried_again(tmp_path, gateway):
  gateway.fails = {"mesh_shrink"}
  assert len(_run(tmp_path, gateway)) == 3  # the others go on
  verdict = _verdict(tmp_path, "mesh_shrink")
  assert verdict["error"] == "policy 'mesh_shrink' can't recover"
  assert verdict["overall"] in ("false", "unknown")
  assert verdict["failed"][-1] == "run failed"
  place = tmp_path / "out" / "rank_lost_decode" / "mesh_shrink" / "seed0"
  assert len((place / "history.jsonl").read_text().splitlines()) == 7
  gateway.fails = set()
  assert _run(tmp_path, gateway) == [("mesh_shrink", 0)]
  assert _verdict(tmp_path, "mesh_shrink")["overall"] == "true"


def test_a_failed_twin_proves_nothing(tmp_path, gateway):
  gateway.fails = {"none"}
  _run(tmp_path, gateway)
  assert _verdict(tmp_path, "kv_restore")["overall"] == "unknown"


def test_a_policy_that_changes_the_text_is_found_out(tmp_path, gateway):
  gateway.wrong = "kv_restore"
  _run(tmp_path, gateway)
  assert "exactness" in _verdict(tmp_path, "kv_restore")["failed"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"ranks": 5}, "ranks is 4 there, 5 now; choose a new --workdir"),
    ({"workload": {"count": 2}}, "workload is .* there"),
    ({"fault_step": 5}, "fault_step is 3 there, 5 now"),
    # Found in the run itself, since other policies may have arguments.
    (
      {"policy_kwargs": {"kv_restore": {"checkpoint": "host"}}},
      'policy_kwargs is {} there, {"checkpoint": "host"} now',
    ),
    ({"ranks": 5, "seeds": "1"}, "ranks is 4 there"),
  ],
)
def test_another_configs_work_directory_is_refused(
  tmp_path, gateway, changes, message
):
  _run(tmp_path, gateway)
  before = (tmp_path / "out" / "config.json").read_text()
  with pytest.raises(ValueError, match=message):
    _run(tmp_path, gateway, **changes)
  assert (tmp_path / "out" / "config.json").read_text() == before
  assert len(gateway.ran) == 3


def test_a_work_directory_from_before_a_key_was_there_goes_on(
  tmp_path, gateway
):
  _run(tmp_path, gateway)
  file = tmp_path / "out" / "config.json"
  old = json.loads(file.read_text())
  for young in ("attention", "exchange", "detector", "leave_out"):
    del old[young]
  file.write_text(json.dumps(old))
  assert _run(tmp_path, gateway) == []
  message = "exchange is {} there"
  with pytest.raises(ValueError, match=message):
    _run(tmp_path, gateway, exchange={"dedup": False})
  del old["ranks"]  # here it was another one's default
  file.write_text(json.dumps(old))
  with pytest.raises(ValueError, match="ranks is 8 there, 4 now"):
    _run(tmp_path, gateway)


def test_another_model_of_the_same_name_is_refused(tmp_path, gateway):
  _run(tmp_path, gateway)
  (tmp_path / "model" / "manifest.json").write_text("{ }")
  with pytest.raises(ValueError, match="checkpoint is .* there"):
    _run(tmp_path, gateway)


def test_runs_that_nobody_can_tell_the_config_of_are_refused(
  tmp_path, gateway
):
  _run(tmp_path, gateway)
  (tmp_path / "out" / "config.json").unlink()
  with pytest.raises(ValueError, match="holds runs without a config.json"):
    _run(tmp_path, gateway)


def test_a_work_directory_that_cannot_be_written_is_refused(tmp_path, gateway):
  (tmp_path / "out").touch()
  with pytest.raises(ValueError, match="--workdir=.*out can't be"):
    _run(tmp_path, gateway)
  assert gateway.ran == []


def test_provenance_keeps_the_earlier_starts(tmp_path, gateway):
  _run(tmp_path, gateway)
  _run(tmp_path, gateway, seeds="1")
  found = json.loads((tmp_path / "out" / "provenance.json").read_text())
  assert found == {"command": "c", "earlier": [{"command": "c"}]}
