"""Sweeps: points of a command line, their runs, one table over all."""

import csv
import json
import warnings

import pytest

from experiments import fleet_figures, sweep_points
from experiments.tasks import Task, run_tasks

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)


def argv(root, workdir, *more):
  return [
    "sweep", f"--config={root / 'configs' / 'fleet.py'}",
    f"--workdir={workdir}", "--config.days=1", "--config.multiplier=50",
    "--config.model=olmoe-1b-7b", "--config.device=h100", "--config.ranks=8",
    "--config.instances=1", "--config.most_rows=16", "--config.cheapest_of=",
    "--jobs=1", *more,
  ]  # fmt: skip


SWEPT = (
  "--sweep.rate=rsc1,llama3",
  "--sweep.policies=mesh_shrink,restart_cached",
  "--sweep.seeds=0,1",
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, request):
  """A finished sweep."""
  workdir = tmp_path_factory.mktemp("sweep") / "runs"
  with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
    warnings.simplefilter("ignore", DeprecationWarning)
    patch.setattr(fleet_figures, "draw", lambda *given: [])  # slow
    command = argv(request.config.rootpath, workdir, *SWEPT)
    assert sweep_points.launch(command) == 0
  return workdir


def test_points_are_the_product_and_rows_stay_inside(repository, tmp_path):
  asked = sweep_points.read(
    argv(repository, tmp_path, *SWEPT, "--sweep.ranks=4,8")
  )
  values = [point.values for point in asked.points]
  assert values == [
    {"rate": rate, "ranks": ranks}
    for rate in ("rsc1", "llama3")
    for ranks in ("4", "8")
  ]
  assert [p.config.ranks for p in asked.points] == [4, 8, 4, 8]
  assert {p.config.seeds for p in asked.points} == {"0,1"}
  assert len({p.workdir for p in asked.points}) == 4
  assert asked.jobs == 1


def test_one_table_over_all_points(swept):
  with (swept / "table.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [(row["rate"], row["policy"], row["seeds"]) for row in rows] == [
    (rate, policy, "2")
    for rate in ("rsc1", "llama3")
    for policy in ("mesh_shrink", "restart_cached")
  ]
  assert "| llama3 |" in (swept / "table.md").read_text()
  for point in json.loads((swept / "points.json").read_text()):
    assert (swept / point["folder"] / "table.md").is_file()


def test_a_finished_sweep_has_nothing_to_do(swept, repository):
  asked = sweep_points.read(argv(repository, swept, *SWEPT))
  for point in asked.points:
    kind = sweep_points.kind_of(point.config)
    assert kind.tasks(point.workdir, point.config, ["sweep"]) == []


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "nothing is swept; give --sweep.KEY=VALUE,VALUE"),
    (("--sweep.rate=rsc1,rsc1",), "no value twice"),
    (("--sweep.rate",), "needed is --sweep.KEY=VALUE"),
    (("--sweep.rate=rsc1", "--jobs=0"), "--jobs=N with N from 1"),
    (("--sweep.rate=often",), "unknown rate 'often'"),
    (("--sweep.colour=red",), "config.colour: unknown key"),
  ],
)
def test_bad_sweeps_are_named_and_write_nothing(
  repository, tmp_path, capsys, flags, message
):
  workdir = tmp_path / "runs"
  assert sweep_points.launch(argv(repository, workdir, *flags)) == 2
  assert message in capsys.readouterr().err
  assert not workdir.exists()


def test_a_turn_waits_for_the_one_before(capsys):
  done = []
  tasks = [
    Task(name, turn, lambda n: done.append(n) or "ok", (name,))
    for name, turn in (("late", 1), ("first", 0), ("last", 2))
  ]
  run_tasks(tasks, jobs=1)
  assert done == ["first", "late", "last"]
  out = capsys.readouterr().out
  assert "[3/3] last: ok" in out
  assert "left" in out
