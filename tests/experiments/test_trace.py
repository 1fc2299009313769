"""The launcher that shows one run: table, figure, trace, errors."""

import csv
import json
import pathlib

import pytest

from experiments import trace
from resilient_moe import report
from tests.report import synthetic as s

U = s.STEP_S
FILES = {
  "trace.json", "requests.md", "requests.csv", "requests.png", "requests.pdf",
}  # fmt: skip


def _launch(folder: pathlib.Path, *more: str) -> int:
  return trace.launch(["trace.py", f"--run={folder}", *more])


@pytest.fixture
def run(tmp_path) -> pathlib.Path:
  """A run with its fault-free twin."""
  s.store(tmp_path, s.twin(), None)
  s.store(tmp_path, s.recovered(), s.twin())
  return tmp_path / "one_rank/mesh_shrink/seed0"


@pytest.fixture
def drawn(monkeypatch) -> list:
  """The figures, which are not saved: that takes the most time."""
  figures: list = []
  monkeypatch.setattr(
    trace.style, "save", lambda figure, stem: figures.append(figure) or [stem]
  )
  return figures


def test_it_writes_everything_into_the_runs_folder(run, capsys):
  before = {file.name for file in run.iterdir()}
  assert _launch(run) == 0
  assert {file.name for file in run.iterdir()} == before | FILES
  out = capsys.readouterr().out
  assert all(name in out for name in FILES)
  assert (run / "requests.png").read_bytes().startswith(b"\x89PNG")
  assert (run / "requests.pdf").read_bytes().startswith(b"%PDF")
  assert json.loads((run / "trace.json").read_text())["traceEvents"]


def test_the_table(run, drawn):
  assert _launch(run) == 0
  lines = (run / "requests.md").read_text().splitlines()
  assert lines[0] == "### ranks_lost, rank 3, at 1.38 s"
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:6]]
  assert cells[0] == trace.HEADER
  assert cells[2] == [
    "1", "yes", "0", "-", "0", "0.875", "0.75", "6", "no", "0.25", "0.625",
    "0.625",
  ]  # fmt: skip
  assert cells[3] == [
    "2", "no", "0", "0", "0", "0.75", "0.625", "5", "no", "0.25", "-", "0.625",
  ]  # fmt: skip


def test_the_csv(run, drawn):
  assert _launch(run) == 0
  with (run / "requests.csv").open(encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  assert [(r["fault"], r["request"], r["affected"]) for r in rows] == [
    ("0", "1", "yes"), ("0", "2", "no"),
  ]  # fmt: skip
  assert [float(r["stall_s"]) for r in rows] == [6 * U, 5 * U]
  assert [r["moved_s"] for r in rows] == [str(5 * U), ""]
  assert float(rows[0]["fault_s"]) == s.START_S + 3 * U


def test_the_usual_gap_is_that_of_a_twin_that_checks(run, drawn):
  slow = run.parent.parent / "none" / "seed0"
  events = s.twin()
  for event in events:
    event["t"] *= 2
  lines = "".join(json.dumps(event) + "\n" for event in events)
  (slow / "history.jsonl").write_text(lines)
  assert trace.twin_of(run) == events
  assert trace.show(run, 1.0)
  # Seven steps without a token are 2.5 beyond a usual gap of two.
  assert "|        2.5 |" in (run / "requests.md").read_text()
  shared = run.parents[2] / "none" / "none"
  shared.parent.mkdir()
  slow.parent.rename(shared)
  assert trace.twin_of(run) == events
  (shared / "seed0" / "verdict.json").write_text('{"overall": "false"}')
  assert trace.twin_of(run) is None


def test_no_fault_no_table(run, capsys):
  twin = run.parent.parent / "none" / "seed0"
  assert _launch(twin) == 0
  assert "no request was there at a fault" in capsys.readouterr().out
  assert {f.name for f in twin.iterdir()} & FILES == {"trace.json"}


def test_several_faults_are_several_tables_and_panels():
  b = s.Builder()
  b.accept(1)
  for number in range(3):
    b.step(1)
    b.fault(1, ranks=(number,))
    b.step(1)
  found = report.request_timelines(b.end(), 10.0)
  assert len(trace.panels(found)) == 3
  text = trace.timeline_table(found)
  assert text.count("###") == 3
  assert text.index("rank 0") < text.index("rank 1") < text.index("rank 2")
  rows = list(csv.DictReader(trace.timeline_csv(found).splitlines()))
  assert [row["fault"] for row in rows] == ["0", "1", "2"]


def _many(requests: int) -> list:
  b = s.Builder()
  names = range(requests)
  for name in names:
    b.accept(name)
  b.step(*names)
  b.step(*names)
  b.fault(requests - 1)
  b.step(*names[:-2])
  b.now_s += 5.0
  b.step(*names[1:])
  b.finish(*names[1:])
  return b.end()


def test_the_figure_draws_a_dot_for_each_token(drawn, tmp_path):
  found = report.request_timelines(_many(4), 1.0)
  trace.request_figure(found, tmp_path / "x")
  (axis,) = drawn[0].axes
  names = [label.get_text() for label in axis.get_yticklabels()]
  # The affected first, then those that waited longest.
  assert names == ["3 (0)", "2 (0)", "0 (0→-)", "1 (0)"]  # 0 never goes on
  rows = {}
  for line in axis.lines:
    if line.get_linestyle() == "None" and line.get_marker() in "os":
      y = int(line.get_ydata()[0])
      rows[names[y].split()[0]] = line.get_marker(), len(line.get_xdata())
  # Two before the fault, one after it for some; 5 s later is out of sight.
  assert rows == {"3": ("s", 2), "0": ("o", 3), "1": ("o", 3), "2": ("o", 2)}
  # Neither what is drawn nor the axis reaches beyond the window.
  assert axis.get_xlim()[1] < 1.1


def test_a_figure_of_many_requests_stays_a_page(drawn, tmp_path):
  found = report.request_timelines(_many(300), 1.0)
  trace.request_figure(found, tmp_path / "x")
  (axis,) = drawn[0].axes
  assert len(axis.get_yticks()) == trace.SHOWN
  assert axis.get_yticklabels()[0].get_text().startswith("299 ")
  assert f"{trace.SHOWN} of 300 requests" in axis.get_title(loc="left")
  assert drawn[0].get_size_inches()[1] < 10


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "needed is --run=DIR"),
    (["--run={}/missing"], "holds no history.jsonl"),
    (["--run={}"], "holds no history.jsonl"),
    (["--run={run}", "--around_s=0"], "--around_s=0.0 is no length"),
    (["--run={run}", "--around_s=nan"], "is no length"),
    (["--run={run}", "--around_s=x"], "around_s"),
    (["--run={run}", "stray"], "nothing else"),
    (["--run={run}", "--other=1"], "other"),
  ],
)
def test_bad_input_is_one_clear_line(run, capsys, flags, message):
  folder = run.parents[2]
  flags = [flag.format(folder, run=run) for flag in flags]
  assert trace.launch(["trace.py", *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert message in error
  assert not (run / "trace.json").exists()


def test_a_damaged_history_is_one_clear_line(run, capsys):
  (run / "history.jsonl").write_text("{}\n{}\n")
  assert _launch(run) == 2
  assert "history.jsonl:1: not an event" in capsys.readouterr().err


def test_a_run_that_was_cut_off_shows_what_there_is(run, drawn):
  file = run / "history.jsonl"
  file.write_text(file.read_text()[:-5])
  assert _launch(run) == 0
  assert len(drawn) == 1


def test_a_run_outside_of_a_comparison(run, drawn, tmp_path):
  lonely = tmp_path / "lonely"
  lonely.mkdir()
  (run / "history.jsonl").rename(lonely / "history.jsonl")
  assert _launch(lonely) == 0
