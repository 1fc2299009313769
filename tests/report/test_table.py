"""Tables: rows over seeds, invalid rows, and the three formats."""

import csv
import io
import pathlib
import re

import pytest

from resilient_moe import report
from resilient_moe.report.latex import escape
from resilient_moe.report.rows import stat
from tests.report import synthetic as s


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """Two seeds: the twin, a good policy, the baseline, and a broken policy."""
  for seed in (0, 1):
    quiet = s.twin(seed=seed)
    s.store(tmp_path, quiet, None)
    s.store(tmp_path, s.recovered(seed=seed), quiet)
    s.store(tmp_path, s.recovered("restart_cached", seed=seed), quiet)
    broken = s.recovered("bad_policy", seed=seed)
    if seed == 1:
      broken = s.without(broken, "finished")
    s.store(tmp_path, broken, quiet)
  return tmp_path


def _read(folder: pathlib.Path) -> dict[str, dict[str, str]]:
  text = (folder / "table.csv").read_text()
  return {row["policy"]: row for row in csv.DictReader(io.StringIO(text))}


def test_csv_has_all_columns_at_full_precision(folder: pathlib.Path) -> None:
  rows = report.write_tables(folder)
  assert [row.policy for row in rows] == [
      "none", "restart_cached", "bad_policy", "mesh_shrink"
  ]  # fmt: skip
  row = _read(folder)["mesh_shrink"]
  assert set(report.METRICS) < row.keys()
  assert row["scenario"] == "one_rank"
  assert row["runtime"] == "process"
  assert row["deployment"] == "collocated"
  assert row["seeds"] == "2"
  assert row["verdict"] == "true"
  assert float(row["affected_stall_s"]) == 6 * s.STEP_S
  assert float(row["affected_stall_s_low"]) == 6 * s.STEP_S
  assert float(row["affected_speedup_vs_restart"]) == 1.0
  assert float(row["horizon_s"]) == 7 * s.STEP_S
  assert row["overhead"] == ""


def test_invalid_rows_show_no_number(folder: pathlib.Path) -> None:
  report.write_tables(folder)
  row = _read(folder)["bad_policy"]
  assert row["verdict"] == "false"
  assert "accounting" in row["failed_checkers"]
  for name in report.METRICS:
    assert row[name] == row[f"{name}_low"] == row[f"{name}_high"] == "invalid"
  assert row["stall_by_action_s"] == "invalid"
  for name in ("table.md", "table.tex"):
    text = (folder / name).read_text()
    lines = [x for x in text.splitlines() if re.search(r"bad\\?_policy", x)]
    assert lines
    for line in lines:
      cells = re.split(r"[|&]", line.strip(" |\\"))
      assert not [c for c in cells if re.fullmatch(r"[\d.]+", c.strip())][1:]
      assert "invalid" in line
    assert "false (accounting" in lines[0]


@pytest.mark.parametrize("file", ["verdict.json", "history.jsonl"])
def test_unfinished_runs_are_invalid(folder: pathlib.Path, file: str) -> None:
  (folder / "one_rank" / "mesh_shrink" / "seed0" / file).unlink()
  report.write_tables(folder)
  row = next(r for r in report.rows_of(report.read_runs(folder)) if r.failed)
  assert row.verdict in ("unknown", "false")
  assert any("missing" in each for r in report.rows_of(
      report.read_runs(folder)) for each in r.failed)  # fmt: skip


def test_an_unreadable_history_is_invalid(folder: pathlib.Path) -> None:
  path = folder / "one_rank" / "mesh_shrink" / "seed0" / "history.jsonl"
  path.write_text(path.read_text()[:-5])
  rows = report.write_tables(folder)
  found = {row.verdict for row in rows if row.policy == "mesh_shrink"}
  assert "unknown" in found


def test_crashed_metrics_make_a_row_invalid(folder: pathlib.Path) -> None:
  path = folder / "one_rank" / "mesh_shrink" / "seed0" / "history.jsonl"
  path.write_text(path.read_text().replace('"emitted"', '"omitted"'))
  rows = {row.policy: row for row in report.write_tables(folder)}
  assert rows["mesh_shrink"].verdict == "unknown"
  assert "metrics crashed" in rows["mesh_shrink"].failed[0]
  assert rows["restart_cached"].valid


def test_an_invalid_baseline_gives_no_speedup(folder: pathlib.Path) -> None:
  for path in folder.glob("one_rank/restart_cached/*/verdict.json"):
    path.write_text('{"overall": "false", "failed": ["fencing"]}')
  report.write_tables(folder)
  row = _read(folder)["mesh_shrink"]
  assert row["affected_speedup_vs_restart"] == ""
  assert row["horizon_s"] == ""
  assert "No speedups" in (folder / "table.md").read_text()


def test_tolerance_marks_the_row(folder: pathlib.Path) -> None:
  path = folder / "one_rank" / "mesh_shrink" / "seed0" / "verdict.json"
  path.write_text('{"overall": "true (tolerance)", "failed": []}')
  report.write_tables(folder)
  assert _read(folder)["mesh_shrink"]["verdict"] == "true (tolerance)"
  assert _read(folder)["mesh_shrink"]["step_s"] != "invalid"


def test_markdown_is_aligned_and_breaks_the_stall_down(
    folder: pathlib.Path,
) -> None:
  report.write_tables(folder)
  text = (folder / "table.md").read_text()
  for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
  assert "### one_rank (process, collocated)" in text
  assert "CopyExperts 0.25" in text
  assert "prefill/steps 0.125" in text
  assert "TTFT at most 2 s" in text


def test_latex_is_well_formed(folder: pathlib.Path) -> None:
  report.write_tables(folder)
  text = (folder / "table.tex").read_text()
  body = "\n".join(x for x in text.splitlines() if not x.startswith("%"))
  for rule in ("toprule", "midrule", "bottomrule"):
    assert f"\\{rule}" in body
  assert not re.search(r"(?<!\\)[_#$%^~]", body)
  plain = body.replace(r"\{", "").replace(r"\}", "")
  depth = 0
  for character in plain:
    depth += {"{": 1, "}": -1}.get(character, 0)
    assert depth >= 0
  assert depth == 0
  columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", body)
  assert columns is not None
  rows = [x for x in body.splitlines() if " & " in x]
  assert {x.count(" & ") + 1 for x in rows} == {len(columns[1])}
  assert all(x.endswith(r" \\") for x in rows)
  # After a \\ a bracket would be taken for a length.
  assert not re.search(r"\\\\\s*\[", body)


def test_escape() -> None:
  assert escape("a_b & 5% {x}\\") == r"a\_b \& 5\% \{x\}\textbackslash{}"


def test_intervals() -> None:
  few = stat([3.0, None, 1.0, 2.0])
  assert few is not None
  assert few[:3] == (2.0, 1.0, 3.0)
  assert few.samples == (3.0, 1.0, 2.0)
  many = stat([float(x) for x in range(50)])
  assert many is not None
  assert 0 < many.low < many.median < many.high < 49
  assert many == stat([float(x) for x in range(50)])
  assert stat([None]) is None


def test_a_failed_write_leaves_the_old_table(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  report.write_tables(folder)
  before = sorted(folder.iterdir())
  old = (folder / "table.csv").read_text()

  def fail(*unused: object) -> None:
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    report.write_tables(folder, tbt_slo_s=1.0)
  assert (folder / "table.csv").read_text() == old
  assert sorted(folder.iterdir()) == before


def test_an_empty_directory_is_an_error(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match="holds no runs"):
    report.write_tables(tmp_path)
