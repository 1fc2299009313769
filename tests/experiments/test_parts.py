"""A campaign over two deployments: parts, each with its own folder."""

import csv
import json
import pathlib
import shlex

import pytest

from configs import campaign_split as shipped
from experiments import campaign, campaign_table, cases, parts, run
from tests.experiments.run_fake import FakeGateway, config_file, tiny

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
PARTS = {
  "one": {"scenarios": "rank_lost_decode"},
  "two": {
    "deployment": "disaggregated",
    "ranks": 5,
    "attention": 2,
    "scenarios": "ew_lost,aw_lost",
    "policies": "tarragon",
    "options": {"max_len": 96},
  },
}
ONE = [("rank_lost_decode", "mesh_shrink"), ("rank_lost_decode", "kv_restore")]
TWO = [("ew_lost", "tarragon"), ("aw_lost", "tarragon")]


@pytest.fixture
def gateway(monkeypatch):
  fake = FakeGateway()
  monkeypatch.setattr(campaign, "run_case", fake)
  monkeypatch.setattr(run, "run_case", fake)
  return fake


def _launch(tmp_path, *flags, **changes):
  file = tmp_path / "config.py"
  if not file.exists():
    config_file(tmp_path, parts=PARTS, **changes)
  return campaign.launch(
    ["campaign", f"--config={file}", f"--workdir={tmp_path}/out", *flags]
  )


def _read(tmp_path, **changes):
  return parts.read(tiny(tmp_path, **changes), tmp_path / "out")


def _ran(gateway):
  return [(scenario, policy) for scenario, policy, _ in gateway.ran]


def test_both_deployments_in_one_table(tmp_path, gateway, capsys):
  assert _launch(tmp_path) == 0
  out = capsys.readouterr().out
  assert out.startswith(
    "campaign: 4 cases and 2 fault-free runs over 1 seeds, 4 kills planned,"
    " runtime emulated, 4 ranks; runtime emulated, 5 ranks, 2 of them"
    " attention; 0 done before\n"
  )
  assert "[1/6] one, none, none, seed 0\n" in out
  assert _ran(gateway) == [("none", "none"), *ONE, ("none", "none"), *TWO]
  folder = tmp_path / "out"
  assert {f.name for f in folder.iterdir()} == {
    "one", "two", "campaign.md", "campaign.csv", "campaign.tex"
  }  # fmt: skip
  with open(folder / "campaign.csv") as file:
    lines = list(csv.DictReader(file))
  assert [line["deployment"] for line in lines] == (
    ["collocated"] * 2 + ["disaggregated"] * 2
  )
  assert [line["struck"] for line in lines] == ["rank", "rank", "EW", "AW"]
  assert {line["verdict"] for line in lines} == {"true"}
  config = json.loads((folder / "two" / "config.json").read_text())
  assert (config["ranks"], config["attention"]) == (5, 2)
  # A table is changed, not replaced.
  assert config["options"]["max_len"] == 96
  assert config["options"]["rows"] == 2
  assert "Runtime emulated, 4 ranks; runtime emulated, 5 ranks" in out


def test_interrupted_it_goes_on_in_the_part_where_it_was(
  tmp_path, gateway, capsys
):
  gateway.interrupt = "tarragon"
  assert _launch(tmp_path) == run.INTERRUPTED
  gateway.interrupt, before = "", len(gateway.ran)
  assert _launch(tmp_path) == 0
  assert _ran(gateway)[before:] == TWO
  assert "4 done before" in capsys.readouterr().out
  assert _launch(tmp_path) == 0
  assert len(gateway.ran) == before + 2


def test_the_command_that_repeats_a_case_finds_its_part(
  tmp_path, gateway, capsys
):
  gateway.wrong = "tarragon"
  assert _launch(tmp_path) == run.FAILED
  err = capsys.readouterr().err
  assert "error: two/ew_lost/tarragon/seed0: verdict false" in err
  command = err.splitlines()[1].removeprefix("  to repeat: ")
  assert "--config.only=two/ew_lost/tarragon/seed0" in command
  gateway.wrong, gateway.ran = "", []
  assert campaign.launch(shlex.split(command)[2:]) == 0
  assert _ran(gateway) == [("none", "none"), ("ew_lost", "tarragon")]
  case = tmp_path / "out" / "repeat" / "two" / "ew_lost" / "tarragon"
  assert (case / "seed0" / "verdict.json").exists()
  assert not list(tmp_path.glob("out/repeat/campaign.*"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"parts": {}}, "config.parts={}: needed are names with tables"),
    ({"parts": 3}, "config.parts=3: needed are names"),
    ({"parts": {"a/b": {}}}, "config.parts.a/b: a part is the name of a fold"),
    ({"parts": {"repeat": {}}}, "config.parts.repeat: .* and not repeat"),
    ({"parts": {"a": 1}}, "config.parts.a=1: needed are keys with values"),
    ({"parts": {"a": {"x": 1}}}, "config.parts.a: config.x: unknown key"),
    ({"parts": {"a": {"scenarios": "x"}}}, "config.parts.a: unknown scenario"),
    (
      {"parts": PARTS, "only": "three/ew_lost/tarragon/seed0"},
      "only='three/.*': needed is PART/SCENARIO/POLICY/seedN; parts: one, two",
    ),
    (
      {"parts": PARTS, "only": "two/ew_lost"},
      "config.parts.two: config.only='ew_lost': needed is SCENARIO/POLICY",
    ),
  ],
)
def test_what_is_wrong_with_a_part_is_named(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, **changes)


def test_a_bad_part_writes_nothing(tmp_path, gateway, capsys):
  assert _launch(tmp_path, "--config.parts.two.ranks=2") == run.BAD_INPUT
  err = capsys.readouterr().err
  assert err.startswith("error: config.parts.two: config.attention=2 of 2")
  assert not (tmp_path / "out").exists()


def test_a_comparison_has_no_parts(tmp_path, gateway, capsys):
  file = config_file(tmp_path, parts=PARTS)
  argv = ["run", f"--config={file}", f"--workdir={tmp_path}/out"]
  assert run.launch(argv) == run.BAD_INPUT
  assert "only experiments.campaign has parts" in capsys.readouterr().err


# -- what ships


def test_the_campaign_over_both_deployments_breaks_two_hundred_times(tmp_path):
  config = shipped.get_config()
  config.checkpoint = tiny(tmp_path).checkpoint
  found = {part.name: part for part in parts.read(config, tmp_path / "out")}
  assert list(found) == ["collocated", "disaggregated"]
  faults = kills = judged = 0
  for name, part in found.items():
    for job in part.jobs:
      case = job.case
      assert (case.deployment, case.runtime) == (name, "process")
      shape = (6, 2) if name == "disaggregated" else (4, 0)
      assert (case.ranks, case.attention) == shape
      judged += case.policy != cases.TWIN
      faults += len(case.faults)
      kills += campaign_table.planned_kills(case.faults)
  said = f"{faults} faults ({kills} kills) in {judged} cases"
  assert said in shipped.__doc__
  assert faults >= 200
  apart = {job.case.scenario for job in found["disaggregated"].jobs}
  assert apart >= {*shipped.SINGLE, shipped.APART}


def test_the_place_of_a_case_is_where_its_folder_is(tmp_path, gateway):
  _launch(tmp_path)
  part = parts.read(
    run.parse(
      ["c", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/out"]
    ).config,
    tmp_path / "out",
  )[1]
  place = part.place(part.jobs[-1])
  assert place == pathlib.PurePath("two/aw_lost/tarragon/seed0")
  assert (tmp_path / "out" / place / "case.json").exists()
