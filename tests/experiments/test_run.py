"""The command: what it prints, writes and returns."""

import io
import json
import pathlib

import pytest

from experiments import figures, progress, provenance, run, table
from tests.experiments.run_fake import FakeGateway, config_file

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)


@pytest.fixture
def gateway(monkeypatch):
  fake = FakeGateway()
  monkeypatch.setattr(run, "run_case", fake)
  return fake


def _launch(tmp_path, *flags, **changes):
  """Runs the command in tmp_path/out; its exit status."""
  file = tmp_path / "config.py"
  if not file.exists():
    config_file(tmp_path, **changes)
  return run.launch(
    ["run.py", f"--config={file}", f"--workdir={tmp_path}/out", *flags]
  )


def test_a_comparison_from_end_to_end(tmp_path, gateway, capsys):
  assert _launch(tmp_path) == 0
  out = capsys.readouterr().out
  assert "[2/3] mesh_shrink, rank_lost_decode, seed 0" in out
  assert "| policy " in out
  assert "under kv_restore, which lost its rank" in out
  assert "The fault-free run gives the same text: yes" in out
  assert f"In {tmp_path}/out: table.md" in out
  assert {file.name for file in (tmp_path / "out").iterdir()} == {
    "config.json",
    "provenance.json",
    "rank_lost_decode",
    "table.csv",
    "table.md",
    "table.tex",
    "timeline.pdf",
    "timeline.png",
  }


def test_flags_override_the_config(tmp_path, gateway):
  status = _launch(
    tmp_path,
    "--config.policies=kv_restore,retry",
    "--config.seeds=0,1",
    "--config.ranks=6",
    "--config.options.dispatch=all_gather",
    "--config.policy_kwargs.kv_restore.checkpoint=host",
    "--config.policy_kwargs.retry.replace=true",
  )
  assert status == 0
  assert [(policy, seed) for _, policy, seed in gateway.ran] == [
    (policy, seed)
    for seed in (0, 1)
    for policy in ("none", "kv_restore", "retry")
  ]
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["ranks"] == 6
  assert config["seeds"] == [0, 1]
  assert config["options"]["dispatch"] == "all_gather"
  assert config["policy_kwargs"] == {
    "kv_restore": {"checkpoint": "host"},
    "retry": {"replace": True},
  }


def test_a_policy_from_outside_takes_arguments_by_its_path(
  tmp_path, gateway, monkeypatch
):
  source = "from policies.kv_restore import make as theirs\n"
  (tmp_path / "my_module.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  flags = (
    "--config.policies=my_module.theirs",
    "--config.policy_kwargs.my_module.theirs.checkpoint=host",
  )
  assert _launch(tmp_path, *flags) == 0
  assert gateway.ran[1][1] == "my_module.theirs"


def test_without_faults_there_is_a_table_and_no_figure(
  tmp_path, gateway, capsys
):
  assert _launch(tmp_path, "--config.faults=none") == 0
  assert {scenario for scenario, _, _ in gateway.ran} == {"none"}
  assert not (tmp_path / "out" / "timeline.png").exists()


def test_asked_again_it_runs_nothing(tmp_path, gateway, capsys):
  _launch(tmp_path)
  provenance_before = (tmp_path / "out" / "provenance.json").read_text()
  capsys.readouterr()
  assert _launch(tmp_path) == 0
  assert len(gateway.ran) == 3
  assert "done before; verdict true" in capsys.readouterr().out
  again = (tmp_path / "out" / "provenance.json").read_text()
  assert again == provenance_before


def test_a_run_that_fails_costs_the_status_and_nothing_else(
  tmp_path, gateway, capsys
):
  gateway.fails = {"mesh_shrink"}
  assert _launch(tmp_path) == 1
  captured = capsys.readouterr()
  assert captured.err == (
    "error: rank_lost_decode/mesh_shrink/seed0: failed: policy 'mesh_shrink' "
    "can't recover\n"
  )
  assert "invalid" in captured.out
  assert "under kv_restore" in captured.out


def test_a_history_that_does_not_check_costs_the_status(
  tmp_path, gateway, capsys
):
  gateway.wrong = "kv_restore"
  assert _launch(tmp_path) == 1
  assert "kv_restore/seed0: verdict false (exactness)" in (
    capsys.readouterr().err
  )


def test_interrupted_it_says_how_to_go_on(tmp_path, gateway, capsys):
  gateway.interrupt = "mesh_shrink"
  assert _launch(tmp_path) == run.INTERRUPTED
  assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--config.nonsense=1",), "config.nonsense: unknown key; choices:"),
    (("--config.ranks=four",), "config.ranks=four"),
    (("--config.policies=nonsense",), "unknown policy 'nonsense'; choices:"),
    (("--config.scenarios=nonsense",), "unknown scenario 'nonsense'; choose"),
    (("--config.options.dispatch=x",), "choose one of all_to_all, all_gather"),
    (("--config.runtime=threads",), "choose one of emulated, logical"),
    (("--config.options.max_len=9",), "longer than the cache's 9 positions"),
    (("--config.policy_kwargs.x=1",), "POLICY.ARGUMENT=VALUE"),
    (("--nonsense=1",), "nonsense"),
    (("nonsense",), "'nonsense' is neither a flag"),
    (("--workdir=",), "--workdir is missing"),
    (("--workdir=/proc/none/out",), "--workdir=/proc/none/out can't be"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(
  tmp_path, gateway, capsys, flags, message
):
  assert _launch(tmp_path, *flags) == run.BAD_INPUT
  captured = capsys.readouterr()
  assert captured.err.startswith("error: ")
  assert captured.err.count("\n") == 1
  assert message in captured.err
  assert captured.out == ""
  assert not (tmp_path / "out").exists()
  assert gateway.ran == []


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "--config is missing"),
    (["--config=none.py"], "none.py"),
    (["--config={tmp}/bad.py"], "no such thing"),
    (["--config={tmp}/key.py"], "error: 'a'\n"),
    (
      ["--config={tmp}/few.py", "--config.exchange.dedup=False"],
      "--config.exchange.dedup=False: config.exchange = {} is missing in",
    ),
  ],
)
def test_a_config_file_that_cannot_be_read_is_one_line(
  tmp_path, capsys, argv, message
):
  bad = "def get_config():\n  raise ValueError('no such thing')\n"
  (tmp_path / "bad.py").write_text(bad)
  (tmp_path / "key.py").write_text("def get_config():\n  return {}['a']\n")
  few = "import ml_collections as m\nget_config = m.ConfigDict\n"
  (tmp_path / "few.py").write_text(few)
  argv = [arg.format(tmp=tmp_path) for arg in argv]
  assert run.launch(["run.py", f"--workdir={tmp_path}/out", *argv]) == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.count("\n") == 1


def test_tables_and_figures_are_rebuilt_from_histories(
  tmp_path, gateway, capsys
):
  _launch(tmp_path)
  out = tmp_path / "out"
  made = [*out.glob("table.*"), *out.glob("timeline.*")]
  before = (out / "table.csv").read_text()
  for file in [*made, *out.glob("*/*/*/verdict.json")]:
    file.unlink()
  assert table.launch(["t", f"--workdir={out}", "--recheck"]) == 0
  assert figures.launch(["f", f"--workdir={out}"]) == 0
  assert all(file.exists() for file in made)
  assert (out / "table.csv").read_text() == before


@pytest.mark.parametrize("launcher", [table, figures])
@pytest.mark.parametrize("flag", ["--workdir=/none", "--nonsense", ""])
def test_rebuilding_from_nothing_is_one_line(launcher, flag, capsys):
  assert launcher.launch(["x", *flag.split()]) == 2
  assert capsys.readouterr().err.count("\n") == 1


def test_provenance_says_what_made_the_numbers():
  found = provenance.provenance(
    "experiments.run", ["run.py", "--config=a b.py"], "emulated", 8
  )
  assert found["command"] == "python -m experiments.run '--config=a b.py'"
  assert "8 virtual devices" in found["device_kind"]
  assert {"python", "jax", "numpy"} <= found["versions"].keys()
  assert {"commit", "dirty", "date", "platform", "cores"} <= found.keys()
  json.dumps(found)


class _Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def _events():
  stage = {"event": "engine", "stage": "weights", "seconds": 2.0}
  return [
    {**stage, "generation": 0},
    {"event": "step", "step": 0},
    {"event": "fault", "t": 1.0, "kind": "rank_lost", "ranks": [3], "step": 1},
    {"event": "plan", "seconds": 0.002},
    {**stage, "generation": 1},
    {"event": "resumed", "t": 1.25},
    {"event": "redundancy", "t": 3.0, "full": True},
    {"event": "end"},
  ]


@pytest.mark.parametrize("out", [io.StringIO, _Terminal])
def test_progress_ends_with_what_happened(out):
  stream, now = out(), iter(range(1000))
  line = progress.Progress("[1/3] p", stream, lambda: float(next(now)))
  for event in _events():
    line(event)
  line.close("verdict true")
  shown = stream.getvalue()
  for part in (
    "[1/3] p",
    "rank lost (rank 3) at step 1",
    "planned in 2 ms",
    "resumed after 250 ms",
    "redundant again after 2 s",
    "restart (weights 2 s)",
    "verdict true\n",
  ):
    assert part in shown
  assert shown.count("\n") <= 3


def test_the_shipped_demo_is_the_configs_command(repository: pathlib.Path):
  makefile = (repository / "Makefile").read_text()
  assert "experiments.run --config=configs/quickstart.py" in makefile
