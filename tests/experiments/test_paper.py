"""A paper's tables and figures: from stored data, with where it comes from."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from configs import paper as config_lib
from experiments import paper, paper_sources
from resilient_moe import report
from resilient_moe.report import fleet, style
from tests.report import synthetic as s

# ml_collections' way to read a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
COMMAND = "python -m experiments.run --config=configs/quickstart.py --workdir=D"
NAMES = list(config_lib.get_config().sources)

# One command a line that every LaTeX table here may use besides `\\`.
_ENVIRONMENT = re.compile(r"\\(begin|end)\{(\w+\*?)\}")


def problems(text: str) -> list[str]:
  """What would keep LaTeX from compiling, as far as it can be seen."""
  text = re.sub(r"(?<!\\)%.*", "", text)
  found, stack = [], []
  for kind, name in _ENVIRONMENT.findall(text):
    if kind == "begin":
      stack.append(name)
    elif not stack or stack.pop() != name:
      found.append(f"\\end{{{name}}} ends nothing")
  found += [f"{name} has no end" for name in stack]
  bare = re.sub(r"\\[\\{}]", "", text)
  if bare.count("{") != bare.count("}"):
    found.append("braces are not balanced")
  if re.search(r"(?<!\\)[#$]", bare):
    found.append("an unescaped special")
  files = r"\\(?:input|includegraphics|label|cite|bibitem)(?:\[.*?\])?\{.*?\}"
  if "_" in re.sub(r"\\_", "", re.sub(files, "", text)):
    found.append("an unescaped underscore")
  for align, body in re.findall(
    r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL
  ):
    found += _column_problems(len(align), body)
  return found


def _column_problems(columns: int, body: str) -> list[str]:
  body = re.sub(r"\\shortstack\{(?:[^{}]|\{[^{}]*\})*\}", "X", body)
  found = []
  for line in re.split(r"\\\\", body):
    if not re.sub(r"\\(top|mid|bottom)rule", "", line).strip():
      continue
    spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
    cells = len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) - len(spans)
    if cells != columns:
      found.append(f"{cells} cells of {columns}: {line.strip()[:60]}")
  return found


def _write(file: pathlib.Path, text: str) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text, "utf-8")


@pytest.fixture
def comparison(tmp_path) -> pathlib.Path:
  """A comparison with a restart, a recovery and a run that doesn't check."""
  folder = tmp_path / "comparison"
  for policy in ("kv_restore", "restart_cached"):
    s.store(folder, s.recovered(policy), s.twin())
  s.store(folder, s.without(s.recovered("odd_100%"), "finished"), s.twin())
  s.store(folder, s.twin(), None)
  origin = {
    "command": COMMAND, "commit": "c0ffee", "dirty": False, "date": "today",
    "device_kind": "8 virtual devices",
    "earlier": [{"command": COMMAND.replace("=D", "=D --config.seeds=1")}],
  }  # fmt: skip
  _write(folder / "provenance.json", json.dumps(origin))
  return folder


def _fleet(folder: pathlib.Path) -> pathlib.Path:
  from experiments import fleet_settings

  config = {"policies": ["kv_restore", "spare_4"], "cheapest_of": []}
  fields = fleet_settings.Settings.__dataclass_fields__
  defaults = {
    name: getattr(fleet_settings.Settings, name)
    for name in fields
    if hasattr(fleet_settings.Settings, name)
  }
  _write(folder / "config.json", json.dumps({**defaults, **config}))
  columns = paper.paper_artifacts.fleet_table.COLUMNS
  lines = [
    json.dumps({
      **dict.fromkeys(columns, 1.5), "policy": policy, "devices": devices,
      "seed": seed, "stall_p50_s": 0.1 * (seed + 1), "stall_p99_s": 9.0,
      "full": 0.999 - 0.001 * seed, "goodput_fraction": 0.99,
      "redundancy_memory": cost, "goodput_tokens_per_s": 1e5,
    })
    for policy, cost in (("kv_restore", 0.1), ("spare_4", 0.05))
    for devices in (64, 1024) for seed in (0, 1)
  ]  # fmt: skip
  _write(folder / "samples.jsonl", "\n".join(lines) + "\n")
  return folder


def _lost_experts(folder: pathlib.Path) -> pathlib.Path:
  from experiments import lost_experts_report as lost

  stat = (1.5, 1.4, 1.6)
  rows = [
    lost.Row("code", "0", 0.0, "", "", stat, stat, stat, stat, stat),
    *(
      lost.Row("code", name, share, which, how, stat, stat, stat, stat, stat)
      for name, share in (("1/16", 1 / 16), ("1/2", 0.5))
      for which in ("most used", "every n-th")
      for how in ("masked", "dropped", "nearest")
    ),
  ]
  folder.mkdir()
  lost.write(folder, rows, False, "")
  return folder


def _launch(workdir: pathlib.Path, *more: str) -> int:
  return paper.main([
    "paper", "--config=configs/paper.py", f"--workdir={workdir}", *more,
  ])  # fmt: skip


def test_simulated_tokens_are_not_called_exact(tmp_path):
  tables = []
  for runtime in ("process", "simulated"):
    folder = tmp_path / runtime
    s.store(folder, s.recovered(runtime=runtime), s.twin())
    s.store(folder, s.twin(runtime=runtime), None)
    rows = report.rows_of(report.read_runs(folder))
    tables.append(paper.paper_artifacts._comparison(rows))
  assert ["exact" in table for table in tables] == [True, False]


def test_a_fleet_is_drawn_with_every_scale_that_was_run(tmp_path):
  folder = _fleet(tmp_path / "fleet")
  lines = (folder / "samples.jsonl").read_text().splitlines()
  samples = [json.loads(line) for line in lines]
  with style.context():
    axis, _ = fleet.stall_scale_figure(samples).axes
    labels = [label.get_text() for label in axis.get_xticklabels()]
    trade, _ = fleet.redundancy_figure(samples).axes
  assert labels == ["64", "1,024"]
  (line,) = (x for x in axis.get_lines() if x.get_label() == "kv_restore")
  assert list(line.get_xdata()) == [64, 1024]
  assert list(line.get_ydata()) == pytest.approx([0.15, 0.15])
  (front,) = (x for x in trade.get_lines() if x.get_linestyle() == "--")
  # The other fills more memory and gives no more.
  assert front.get_xdata() == pytest.approx([5])
  assert front.get_ydata() == pytest.approx([0.0015])


@pytest.fixture(autouse=True)
def at_root(repository, monkeypatch) -> None:
  monkeypatch.chdir(repository)


def test_everything_from_what_is_stored(comparison, tmp_path, capsys):
  out = tmp_path / "paper"
  places = {
    "comparison": comparison,
    "fleet": _fleet(tmp_path / "fleet"),
    "lost_experts": _lost_experts(tmp_path / "lost"),
  }
  flags = [f"--config.sources.{name}={path}" for name, path in places.items()]
  assert _launch(out, *flags) == 0
  made = json.loads((out / "paper.json").read_text())
  names = {a["name"] for a in made["artefacts"]}
  assert names == {
    "comparison-one_rank", "comparison-one_rank-timeline",
    "comparison-one_rank-breakdown", "fleet-table", "fleet-stall-scale",
    "fleet-redundancy-availability", "lost_experts-quality",
  }  # fmt: skip
  document = (out / "paper.tex").read_text()
  for artefact in made["artefacts"]:
    for file in artefact["files"]:
      assert (out / file).stat().st_size > 100
      assert file.endswith(".png") or f"{{{file}}}" in document
  texts = [document, *(f.read_text() for f in out.glob("tables/*.tex"))]
  assert [problems(text) for text in texts] == [[]] * len(texts)
  assert {a["source"] for a in made["absent"]} == set(NAMES) - set(places)
  assert "These commands make it" in capsys.readouterr().out
  _compile(out)


def _compile(folder: pathlib.Path) -> None:
  """Compiles paper.tex where there is something to do it with."""
  if shutil.which("pdflatex"):
    line = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error"]
  elif shutil.which("tectonic"):
    line = ["tectonic"]
  else:
    return
  done = subprocess.run(
    [*line, "paper.tex"], cwd=folder, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-2000:]
  assert (folder / "paper.pdf").read_bytes().startswith(b"%PDF")
  log = (folder / "paper.log").read_text("utf-8", "replace")
  assert "Overfull" not in log or max(
    float(points) for points in re.findall(r"\((\d+\.\d+)pt too wide", log)
  ) < 40


def test_each_artefact_says_what_made_its_data(comparison, tmp_path):
  out = tmp_path / "paper"
  flag = f"--config.sources.comparison={comparison}"
  assert _launch(out, flag, "--config.only=comparison") == 0
  first = json.loads((out / "paper.json").read_text())["artefacts"][0]
  assert first["command"] == COMMAND
  assert first["earlier_commands"] == [f"{COMMAND} --config.seeds=1"]
  told = [first[k] for k in ("runtime", "deployment", "seeds", "commit")]
  assert told == ["process", "collocated", "0", "c0ffee"]
  assert COMMAND in (out / "paper.md").read_text()
  table = (out / "tables/comparison-one_rank.tex").read_text()
  bad = next(line for line in table.splitlines() if "odd" in line)
  assert bad.startswith(r"odd\_100\% & invalid")


def test_what_is_absent_is_named_with_its_command(tmp_path, capsys):
  assert _launch(tmp_path / "paper") == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert "--config.make=True" in error
  assert "-m experiments.fleet --workdir=" in error
  assert not (tmp_path / "paper").exists()


def test_make_runs_what_is_absent(comparison, tmp_path, monkeypatch, capsys):
  made, real = [], subprocess.run

  def run(command, **more):
    if command[0] != sys.executable:
      return real(command, **more)  # git, for the provenance
    made.append(command[1:3])
    folder = pathlib.Path(command[3].removeprefix("--workdir="))
    if "experiments.run" in command:
      shutil.copytree(comparison, folder)
      return subprocess.CompletedProcess(command, 0)
    return subprocess.CompletedProcess(command, 1)

  monkeypatch.setattr(paper_sources.subprocess, "run", run)
  status = _launch(
    tmp_path / "paper", "--config.make=True", "--config.only=comparison,fleet"
  )
  assert status == 1
  assert made == [["-m", "experiments.run"], ["-m", "experiments.fleet"]]
  assert "command of fleet failed" in capsys.readouterr().err
  assert (tmp_path / "paper/paper.tex").is_file()


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--config.only=flet", "'flet': no source; choices: comparison"),
    ("--config.sources.fleet=/nowhere", "'/nowhere': no such folder"),
    ("--config.commands.fleet=ls", "'ls': the first word is one of"),
  ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flag, words):
  assert _launch(tmp_path / "paper", flag) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1


def test_every_command_of_the_config_names_what_exists(repository):
  for name, command in config_lib.get_config().commands.items():
    module, flag, *_ = command.split()
    assert module in paper_sources.MARKS, name
    assert (repository / flag.removeprefix("--config=")).is_file(), name


@pytest.mark.parametrize(
  "text",
  [
    "\\begin{tabular}{ll}a & b \\\\",
    "\\begin{tabular}{ll}a \\\\\\end{tabular}",
    "kv_restore",
    "{",
    "a $ b",
    "\\end{table}",
  ],
)
def test_the_checker_of_latex_finds(text):
  assert problems(text)
