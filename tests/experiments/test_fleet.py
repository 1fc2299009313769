"""The fleet study's launcher, on fleets of seconds."""

import csv
import dataclasses
import json
import warnings

import ml_collections
import pytest

from configs import fleet as config_file
from experiments import (
  fleet,
  fleet_cells,
  fleet_check,
  fleet_figures,
  fleet_settings,
  fleet_table,
)
from resilient_moe import recovery

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
TINY = (
  "--config.instances=1,2",
  "--config.seeds=0",
  "--config.days=2",
  "--config.multiplier=100",
  "--config.jobs=1",
  "--config.model=olmoe-1b-7b",
  "--config.device=h100",
  "--config.ranks=8",
  "--config.most_rows=16",
  "--config.policies=mesh_shrink,restart_cached,cheapest",
  "--config.cheapest_of=mesh_shrink,restart_cached",
)


def launch(repository, workdir, *changes):
  config = repository / "configs" / "fleet.py"
  return fleet.launch(
    ["fleet", f"--config={config}", f"--workdir={workdir}", *TINY, *changes]
  )


@pytest.fixture(scope="module")
def study(tmp_path_factory, request):
  """A finished study."""
  workdir = tmp_path_factory.mktemp("fleet") / "runs"
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    assert launch(request.config.rootpath, workdir) == 0
  return workdir


def test_a_study_leaves_its_files(study):
  for name in ("table.md", "table.csv", "table.tex", "samples.jsonl",
               "stall_scale.png", "stall_scale.pdf", "config.json",
               "redundancy_availability.pdf", "provenance.json"):  # fmt: skip
    assert (study / name).stat().st_size > 0, name
  cell = study / "mesh_shrink" / "devices16" / "seed0"
  sample = json.loads((cell / "sample.json").read_text())
  assert (sample["policy"], sample["devices"]) == ("mesh_shrink", 16)
  events = (cell / "events.jsonl").read_text().splitlines()
  assert len(events) == sample["plans"]
  assert {"t_s", "group", "cause", "ranks"} <= json.loads(events[0]).keys()


def test_the_table_has_a_row_for_each_policy_and_scale(study):
  with (study / "table.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 6
  for row in rows:
    parts = [float(row[name]) for name in ("full", "degraded", "zero")]
    assert sum(parts) == pytest.approx(1)
    assert float(row["failures"]) > 0
  text = (study / "table.md").read_text()
  assert "HPCA 2025" in text
  assert "CC-BY" in text
  assert r"\toprule" in (study / "table.tex").read_text()


def settings_of(workdir):
  given = json.loads((workdir / "config.json").read_text())
  return fleet_settings.read(ml_collections.ConfigDict(given))


def test_a_finished_cell_is_skipped(study):
  settings = settings_of(study)
  assert fleet.todo(study, settings) == []
  more = dataclasses.replace(settings, seeds=(0, 1))
  assert {cell.seed for cell in fleet.todo(study, more)} == {1}


def test_another_config_is_refused(study, repository, capsys):
  assert launch(repository, study, "--config.days=3") == 2
  assert "another config; choose a new --workdir" in capsys.readouterr().err


def test_equal_seeds_give_equal_files(study, tmp_path):
  cell = fleet_cells.Cell("mesh_shrink", 2, 0)
  fleet_cells.run_into(tmp_path, settings_of(study), cell)
  for name in ("sample.json", "events.jsonl"):
    first = study / "mesh_shrink" / "devices16" / "seed0" / name
    assert first.read_text() == (tmp_path / name).read_text()


def config(**changes):
  made = config_file.get_config().to_dict()
  return ml_collections.ConfigDict({**made, **changes})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"colour": 1}, "config.colour: unknown key; choices: attention"),
    ({"policies": ""}, "config.policies is missing"),
    ({"rate": "often"}, "unknown rate 'often'; choices: rsc1"),
    ({"model": "gpt"}, "unknown model 'gpt'"),
    ({"device": "abacus"}, "unknown device 'abacus'"),
    ({"trace": "x"}, "unknown trace 'x'"),
    ({"days": 0.0}, "config.days=0.0: more than 0"),
    ({"instances": "1,1"}, "one or more, none twice"),
    ({"seeds": "a"}, "config.seeds='a': needed are integers"),
    ({"utilisation": "half"}, "config.utilisation='half': needed is a number"),
    ({"repair": {"hours": 1}}, "config.repair.hours: unknown key"),
    ({"traces": "/nowhere"}, "config.traces='/nowhere': no such folder"),
  ],
)
def test_bad_configs_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    fleet_settings.read(config(**changes))


def test_a_policy_that_is_none_is_named(repository, tmp_path, capsys):
  workdir = tmp_path / "runs"
  assert launch(repository, workdir, "--config.policies=hope") == 2
  assert "unknown policy 'hope'" in capsys.readouterr().err
  assert not workdir.exists()


def test_a_scale_at_which_nothing_fits_is_named(repository, tmp_path, capsys):
  workdir = tmp_path / "runs"
  assert launch(repository, workdir, "--config.model=deepseek-v3") == 2
  assert "no rows for requests: 0 of" in capsys.readouterr().err
  assert not workdir.exists()


def sample(policy, goodput, seed=0):
  made = dict.fromkeys(fleet_table.COLUMNS, 1.0)
  return {
    **made, "policy": policy, "devices": 8, "seed": seed,
    "goodput_tokens_per_s": goodput,
  }  # fmt: skip


def test_the_best_fixed_policy_is_best_over_all_seeds():
  samples = [
    sample("a", 10.0), sample("a", 10.0, 1),
    sample("b", 14.0), sample("b", 4.0, 1),
    sample("cheapest", 9.0), sample("cheapest", 11.0, 1),
  ]  # fmt: skip
  by_policy = {row.policy: row for row in fleet_table.rows(samples)}
  found = by_policy["cheapest"].stats["goodput_vs_best_fixed"]
  assert found.samples == (0.9, 1.1)
  only_b = {r.policy: r for r in fleet_table.rows(samples, ("b",))}
  found = only_b["cheapest"].stats["goodput_vs_best_fixed"]
  assert found.samples == (9 / 14, 11 / 4)


def test_a_front_leaves_out_what_costs_more_for_less():
  points = [(0.0, 5.0), (1.0, 6.0), (2.0, 1.0), (2.0, 3.0), (3.0, 1.0)]
  assert fleet_figures.pareto(points) == [(0.0, 5.0), (2.0, 1.0)]


def test_the_closed_form_is_near_to_stepping(monkeypatch):
  monkeypatch.setattr(fleet_check, "WARM_S", 60.0)
  monkeypatch.setattr(fleet_check, "FAULT_S", 120.0)
  monkeypatch.setattr(fleet_check, "END_S", 180.0)
  row = fleet_check.compare("mesh_shrink", 8, 0.4, 0)
  for name, limit in (
    ("tokens", 0.1), ("gap_s", 0.15), ("stall_s", 0.05), ("ttft_p90_s", 0.25),
  ):  # fmt: skip
    stepped, closed = row[name]
    assert closed == pytest.approx(stepped, rel=limit), name
  text, table = fleet_check.to_tables([row, {**row, "seed": 1}])
  assert text.count("| mesh_shrink ") == 1
  assert len(table.splitlines()) == 3


def test_real_traces_are_read_where_they_are_given(study, tmp_path):
  lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
  lines += [f"2023-11-16 18:0{m}:{s:02}.0,100,7" for m in (1, 2, 3)
            for s in range(0, 60, 20 - 5 * m)]  # fmt: skip
  name = "AzureLLMInferenceTrace_conv.csv"
  (tmp_path / name).write_text("\n".join(lines) + "\n")
  settings = dataclasses.replace(settings_of(study), traces=str(tmp_path))
  load = fleet_cells.load_of(settings)
  assert load.name == "azure conv"
  assert len(load.relative) == 2
  assert load.relative[1] > load.relative[0]
  assert (load.context_mean, load.generated_mean) == (100.0, 7.0)


def test_a_label_may_name_another_policy_and_take_the_defaults(study):
  settings = dataclasses.replace(
    settings_of(study),
    policy_kwargs={"two": {"policy": "spare", "spares": 2}},
    policy_defaults={"replace": True},
  )
  costs = fleet_cells.costs_of(settings)
  two = fleet_cells.policy_of(settings, "two", costs)
  assert (two.name, two.spares) == ("two", 2)
  view = recovery.start(recovery.load("eep"), recovery.bare_view(4, 8), 4)
  plans = [
    fleet_cells.policy_of(s, "mesh_shrink", costs).recover(
      view, recovery.RanksLost((1,))
    )
    for s in (settings, dataclasses.replace(settings, policy_defaults={}))
  ]
  launches = [
    any(isinstance(a, recovery.LaunchRank) for a in plan.repair)
    for plan in plans
  ]
  assert launches == [True, False]
