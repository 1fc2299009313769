"""A campaign: many cases, one twin a seed, a table that hides nothing."""

import csv
import dataclasses
import json
import pathlib
import shlex

import jax
import pytest

from configs import campaign as shipped
from experiments import campaign, campaign_table, cases, run, settings, sweep
from resilient_moe import report
from resilient_moe.model import ModelConfig, init_params, save_checkpoint
from resilient_moe.runtime import case as case_lib
from tests.experiments.run_fake import FakeGateway, config_file, tiny

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
SCENARIOS = "rank_lost_decode,neighbours"
MODEL = ModelConfig(
  n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4,
  expert_width=16,
)  # fmt: skip


@pytest.fixture
def gateway(monkeypatch):
  fake = FakeGateway()
  monkeypatch.setattr(campaign, "run_case", fake)
  return fake


def _launch(tmp_path, *flags, **changes):
  """Runs the command in tmp_path/out; its exit status."""
  file = tmp_path / "config.py"
  if not file.exists():
    config_file(tmp_path, **{"scenarios": SCENARIOS, "seeds": "0,1"} | changes)
  return campaign.launch(
    ["campaign", f"--config={file}", f"--workdir={tmp_path}/out", *flags]
  )


def _csv(tmp_path):
  with open(tmp_path / "out" / "campaign.csv") as file:
    return list(csv.DictReader(file))


def _table(text):
  """The rows of the readable table, by policy and column."""
  first = text[text.index("| policy ") :].partition("\n\n")[0]
  lines = first.splitlines()
  grid = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
  return {cells[0]: dict(zip(grid[0], cells, strict=True)) for cells in grid}


def test_a_campaign_from_end_to_end(tmp_path, gateway, capsys):
  assert _launch(tmp_path) == 0
  out = capsys.readouterr().out
  assert out.startswith(
    "campaign: 8 cases and 2 fault-free runs over 2 seeds, 12 kills planned,"
    " runtime emulated, 4 ranks; 0 done before\n"
  )
  assert "[1/10] none, none, seed 0\n" in out
  assert "s left] kv_restore, neighbours, seed 1\n" in out
  assert gateway.ran == [
    *(("none", "none", seed) for seed in (0, 1)),
    *(
      (scenario, policy, seed)
      for scenario in SCENARIOS.split(",")
      for seed in (0, 1)
      for policy in ("mesh_shrink", "kv_restore")
    ),
  ]
  table = _table((tmp_path / "out" / "campaign.md").read_text())
  assert list(table)[2:] == ["mesh_shrink", "kv_restore", "all"]
  row = table["all"]
  assert (row["cases"], row["kills"], row["recovered"]) == ("8", "12", "8")
  assert (row["verdict_true"], row["exact_outputs"]) == ("8", "32/32")
  assert row["detect_p50"] == "-", "nothing is detected on this runtime"
  assert "emulated on cpu" in out
  assert "Commit " in out


def test_every_case_is_judged_by_the_twin_of_its_seed(tmp_path, gateway):
  _launch(tmp_path)
  for name in SCENARIOS.split(","):
    folder = tmp_path / "out" / name / "kv_restore" / "seed1"
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["checkers"]["exactness"]["value"] == "true"
  twins = sorted(
    str(folder.relative_to(tmp_path / "out"))
    for folder in tmp_path.glob("out/*/none/seed*")
  )
  assert twins == ["none/none/seed0", "none/none/seed1"]
  # The tables of an ordinary comparison find it too.
  runs = report.read_runs(tmp_path / "out")
  case = next(r for r in runs if r.policy == "kv_restore" and r.seed == "1")
  twin = report.runs.find(runs, case, "none")
  assert (twin.scenario, twin.policy, twin.seed) == ("none", "none", "1")


@pytest.mark.parametrize("own", SCENARIOS.split(","))
def test_a_scenario_with_requests_of_its_own_has_a_twin_of_its_own(
  tmp_path, gateway, own
):
  assert _launch(tmp_path, workloads={own: {"new_tokens": (4, 4)}}) == 0
  twins = {place for place in gateway.ran if place[1] == "none"}
  assert twins == {(x, "none", seed) for x in ("none", own) for seed in (0, 1)}
  lines = _csv(tmp_path)
  assert len(lines) == 8
  for line in lines:
    assert line["exact"] == "1.0", line
    assert line["changed_tokens"] == "0", line


def test_a_line_for_each_case(tmp_path, gateway):
  _launch(tmp_path)
  lines = _csv(tmp_path)
  assert list(lines[0]) == [
    "scenario", "policy", "seed", "deployment", "faults", "kills", "recovered",
    "verdict", "lost_requests", "changed_tokens", "repeated_tokens", "exact",
    "detect_s", "resume_s", "redundancy_s", "struck", "resume_steps",
    "own_gaps", "others_gaps", "repeat",
  ]  # fmt: skip
  assert len(lines) == 8
  last = lines[-1]
  assert (last["scenario"], last["policy"]) == ("neighbours", "kv_restore")
  assert (last["faults"], last["kills"]) == ("1", "2")
  assert (last["recovered"], last["verdict"]) == ("true", "true")
  assert (last["lost_requests"], last["exact"]) == ("0", "1.0")
  assert float(last["resume_s"]) == pytest.approx(0.05)
  assert last["redundancy_s"] == "0.0"
  assert (last["deployment"], last["struck"]) == ("collocated", "rank")
  assert float(last["resume_steps"]) == pytest.approx(1)


def test_interrupted_it_goes_on_where_it_was(tmp_path, gateway, capsys):
  gateway.interrupt = "kv_restore"
  assert _launch(tmp_path) == run.INTERRUPTED
  assert "the same command goes on" in capsys.readouterr().err
  assert not (tmp_path / "out" / "campaign.csv").exists()
  gateway.interrupt, before = "", len(gateway.ran)
  assert _launch(tmp_path) == 0
  assert "3 done before" in capsys.readouterr().out
  assert len(gateway.ran) - before == 7
  assert gateway.ran[before] == ("rank_lost_decode", "kv_restore", 0)
  assert _launch(tmp_path) == 0
  assert len(gateway.ran) - before == 7, "finished runs are skipped"
  assert len(_csv(tmp_path)) == 8


def test_a_case_that_is_not_valid_is_counted_and_can_be_repeated(
  tmp_path, gateway, capsys
):
  gateway.wrong = "kv_restore"
  assert _launch(tmp_path, scenarios="neighbours", seeds="1") == run.FAILED
  captured = capsys.readouterr()
  table = _table(captured.out)
  row = table["kv_restore"]
  assert (row["cases"], row["verdict_true"]) == ("1", "0")
  assert (row["recovered"], row["changed_tokens"]) == ("1", "32")
  assert (row["exact_outputs"], row["lost_requests"]) == ("0/4", "0")
  assert table["all"]["verdict_true"] == "1"
  assert "Not valid: 1 of 2 cases." in captured.out
  problem, hint = captured.err.splitlines()
  assert problem == (
    "error: neighbours/kv_restore/seed1: verdict false (exactness)"
  )
  command = hint.removeprefix("  to repeat: ")
  lines = _csv(tmp_path)
  assert [line["verdict"] for line in lines] == ["true", "false"]
  assert lines[1]["repeat"] == command

  gateway.wrong, gateway.ran = "", []
  argv = shlex.split(command)
  assert argv[:3] == ["python", "-m", "experiments.campaign"]
  assert campaign.launch(argv[2:]) == 0
  both = [("none", "none", 1), ("neighbours", "kv_restore", 1)]
  assert gateway.ran == both
  assert campaign.launch(argv[2:]) == 0
  assert gateway.ran == [*both, both[1]], "again, though it is finished"
  other = [arg.replace("kv_restore/", "mesh_shrink/") for arg in argv[2:]]
  assert campaign.launch(other) == 0, "in the same folder"
  assert gateway.ran[3:] == [("neighbours", "mesh_shrink", 1)]
  # What was found stays.
  assert [line["verdict"] for line in _csv(tmp_path)] == ["true", "false"]
  assert not list(tmp_path.glob("out/repeat/campaign.*"))


def test_a_run_that_failed_has_a_line_and_a_command(tmp_path, gateway, capsys):
  gateway.fails = {"mesh_shrink"}
  assert _launch(tmp_path, scenarios="neighbours", seeds="0") == run.FAILED
  captured = capsys.readouterr()
  assert "mesh_shrink/seed0: failed: policy 'mesh_shrink' can't recover" in (
    captured.err
  )
  assert "--config.only=neighbours/mesh_shrink/seed0" in captured.err
  row = _table(captured.out)["mesh_shrink"]
  assert (row["cases"], row["recovered"], row["lost_requests"]) == (
    ("1", "0", "4")
  )
  assert row["exact_outputs"] == "0/4"


def test_without_its_twin_nothing_is_exact(tmp_path, gateway, capsys):
  gateway.fails = {"none"}
  assert _launch(tmp_path, scenarios="neighbours", seeds="0") == run.FAILED
  captured = capsys.readouterr()
  row = _table(captured.out)["all"]
  assert (row["verdict_true"], row["exact_outputs"]) == ("0", "0/8")
  assert "--config.only=none/none/seed0" in captured.err
  assert _launch(tmp_path, "--config.only=none/none/seed0") == run.FAILED
  assert _csv(tmp_path)[0]["exact"] == ""


def test_one_odd_history_does_not_cost_the_table(
  tmp_path, gateway, capsys, monkeypatch
):
  phases = report.recovery_phases

  def crash(events):
    if any(e.get("policy") == "kv_restore" for e in events):
      raise KeyError("ranks")
    return phases(events)

  monkeypatch.setattr(report, "recovery_phases", crash)
  assert _launch(tmp_path, scenarios="neighbours", seeds="0") == run.FAILED
  captured = capsys.readouterr()
  assert "neighbours/kv_restore/seed0 can't be measured: 'ranks'" in (
    captured.err
  )
  row = _table(captured.out)["kv_restore"]
  assert (row["cases"], row["verdict_true"], row["recovered"]) == (
    ("1", "0", "0")
  )


def test_the_repeat_command_keeps_the_flags_and_moves_the_folder(tmp_path):
  argv = ["c", "--config", "a.py", "--workdir", "x", "--config.ranks=3",
          "--config.only=a/b/seed0", "--config.policies", "p"]  # fmt: skip
  place = pathlib.PurePath("neighbours/a+b/seed1")
  command = campaign.repeat_command(argv, tmp_path / "my runs", place)
  assert shlex.split(command) == [
    "python", "-m", "experiments.campaign", "--config", "a.py",
    "--config.ranks=3", "--config.policies", "p",
    f"--workdir={tmp_path}/my runs/repeat",
    "--config.only=neighbours/a+b/seed1",
  ]  # fmt: skip


def _jobs(tmp_path, **changes):
  fields = {"scenarios": SCENARIOS, "seeds": "0,1", "shared_twin": True}
  return cases.jobs(settings.read(tiny(tmp_path, **fields | changes)))


@pytest.mark.parametrize("shared", [True, False])
def test_only_one_case_and_its_twin(tmp_path, shared):
  only = "neighbours/kv_restore/seed1"
  jobs = _jobs(tmp_path, only=only, shared_twin=shared)
  twin = "none/none/seed1" if shared else "neighbours/none/seed1"
  assert [str(job.place) for job in jobs] == [twin, only]
  assert [str(j.place) for j in _jobs(tmp_path, only="none/none/seed0")] == [
    "none/none/seed0"
  ]


def test_a_fault_free_scenario_has_its_policies_beside_the_twin(tmp_path):
  jobs = _jobs(tmp_path, scenarios="none,neighbours", seeds="0")
  assert [str(job.place.parent) for job in jobs] == [
    f"{scenario}/{policy}"
    for scenario, *policies in (
      ("none", "none", "mesh_shrink", "kv_restore"),
      ("neighbours", "mesh_shrink", "kv_restore"),
    )
    for policy in policies
  ]


def test_a_pair_can_be_left_out(tmp_path):
  jobs = _jobs(tmp_path, leave_out="neighbours/kv_restore", seeds="0")
  places = [str(job.place.parent) for job in jobs]
  assert places == [
    "none/none", "rank_lost_decode/mesh_shrink", "rank_lost_decode/kv_restore",
    "neighbours/mesh_shrink",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"only": "kv_restore"}, "only='kv_restore': needed is SCENARIO/POLICY/se"),
    ({"only": 3}, "only=3: needed is a text"),
    (
      {"only": "random/kv_restore/seed1"},
      "is no case of this config; scenarios: rank_lost_decode, neighbours; "
      "policies: none, mesh_shrink, kv_restore; seeds: 0, 1",
    ),
    ({"leave_out": "neighbours"}, "='neighbours': needed is SCENARIO/POLICY"),
    ({"leave_out": "neighbours/none"}, "leaves nothing out; scenarios: rank_l"),
    ({"leave_out": "random/kv_restore"}, "leaves nothing out; scenarios: rank"),
    ({"shared_twin": 1}, "config.shared_twin=1: choices: True, False"),
    (
      {"scenarios": "rank_stuck"},
      "'rank_stuck': a fault 'rank_stuck' needs real processes, and the runtime"
      " is 'emulated'; give config.runtime=process",
    ),
    ({"scenarios": "store_and_rank"}, "a fault 'store_lost' needs real proc"),
    (
      {"faults": [{"kind": "supervisor_lost", "at_step": 1}]},
      "'custom': a fault 'supervisor_lost' needs real processes",
    ),
  ],
)
def test_what_cannot_be_run_is_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    _jobs(tmp_path, **changes)


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, gateway, capsys):
  assert _launch(tmp_path, "--config.only=a/b/seed0") == run.BAD_INPUT
  err = capsys.readouterr().err
  assert err.startswith("error: config.only='a/b/seed0' is no case")
  assert err.count("\n") == 1
  assert not (tmp_path / "out").exists()
  assert campaign.launch(["campaign", "--help"]) == 0


def test_a_twin_can_become_shared_in_the_same_folder(tmp_path, gateway):
  """And a folder from before there were shared twins goes on."""
  chosen = settings.read(tiny(tmp_path))
  workdir = tmp_path / "out"
  sweep.start(workdir, chosen, {"command": "c"})
  for job in cases.jobs(chosen):
    sweep.run(job, workdir, gateway, lambda event: None)
  shared = dataclasses.replace(chosen, shared_twin=True)
  jobs = cases.jobs(shared)
  assert [str(j.place) for j in sweep.pending(workdir, shared, jobs)] == [
    "none/none/seed0"
  ]


def test_the_pace_knows_slow_policies_from_fast_ones(tmp_path):
  jobs = _jobs(tmp_path)[2:]
  pace = campaign.Pace()
  assert pace.left(jobs) == ""
  pace.took("mesh_shrink", 2.0)
  assert pace.left(jobs[:3]) == ", 6 s left"
  pace.took("kv_restore", 100.0)
  pace.took("kv_restore", 300.0)
  assert [job.case.policy for job in jobs[:2]] == ["mesh_shrink", "kv_restore"]
  assert pace.left(jobs[:2]) == ", 3 min left"
  assert pace.left(jobs * 9) == ", 2.0 h left"


# -- what ships


def test_the_campaign_that_ships_kills_two_hundred_times(tmp_path, monkeypatch):
  # It is one of the choices, whether the runtime is there or not.
  monkeypatch.setattr(case_lib, "RUNTIMES", ("emulated", "process"))
  chosen = settings.read(shipped.get_config())
  model = tiny(tmp_path).checkpoint
  jobs = cases.jobs(
    dataclasses.replace(chosen, checkpoint=model, shared_twin=True)
  )
  judged = [job for job in jobs if job.case.policy != cases.TWIN]
  planned = sum(campaign_table.planned_kills(j.case.faults) for j in judged)
  assert (len(jobs) - len(judged), len(judged), planned) == (4, 120, 336)
  assert f"{planned} kills in {len(judged)} cases" in shipped.__doc__


@pytest.mark.slow
def test_a_small_campaign_with_a_real_engine(tmp_path, monkeypatch, capsys):
  # See test_run_engine.py.
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  folder = tmp_path / "random"
  save_checkpoint(folder, MODEL, init_params(MODEL, jax.random.key(0)))
  status = _launch(
    tmp_path,
    checkpoint=str(folder),
    ranks=2,
    scenarios="rank_lost_decode",
    policies="kv_restore",
    seeds="0",
  )
  captured = capsys.readouterr()
  assert status == 0, captured.err
  row = _table(captured.out)["all"]
  assert (row["cases"], row["kills"], row["verdict_true"]) == ("1", "1", "1")
  assert row["exact_outputs"] == "4/4"
  assert float(row["resume_p50"]) > 0
