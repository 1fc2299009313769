"""The numbers of a campaign, against histories made by hand."""

import dataclasses
from typing import Any

import pytest

from experiments import campaign_faults, campaign_table, cases, settings
from resilient_moe import report
from resilient_moe.report import exactness
from resilient_moe.runtime import case as case_lib
from tests.experiments.run_fake import tiny
from tests.report import synthetic as s

U = s.STEP_S
TRUE = {"overall": "true", "failed": []}


@pytest.fixture
def process(monkeypatch):
  """The process runtime is one of the choices, whether it is there or not."""
  choices = dict.fromkeys((*case_lib.RUNTIMES, "process"))
  monkeypatch.setattr(case_lib, "RUNTIMES", tuple(choices))


def _line(tmp_path, events, twin: Any = "twin", verdict=TRUE, **case):
  """Measures a hand-made history, as of real processes."""
  job = cases.jobs(settings.read(tiny(tmp_path)))[1]
  given = {"policy": "kv_restore", "runtime": "process", **case}
  return campaign_table.line_of(
    dataclasses.replace(job.case, **given),
    events,
    s.twin() if twin == "twin" else twin,
    verdict,
    "again",
  )


def _lost(**failure):
  events = [
    {**e, "kind": "rank_lost"} if e["event"] == "fault" else e
    for e in s.recovered()
  ]
  return s.edited(events, "failure", 0, **failure) if failure else events


@pytest.mark.usefixtures("process")
def test_the_times_are_those_of_the_history(tmp_path):
  line = _line(tmp_path, _lost())
  assert line.detect_s == (U,)
  assert line.resume_s == (5 * U,)  # reported at 1, request 2 goes on at 6
  assert line.redundancy_s == (9 * U,)
  assert (line.faults, line.kills, line.recovered) == (1, 1, True)
  assert (line.lost_requests, line.exact) == (0, 1.0)
  assert (line.changed_tokens, line.repeated_tokens) == (0, 0)


@pytest.mark.usefixtures("process")
def test_only_what_takes_or_stops_a_rank_has_times(tmp_path):
  events = _lost()
  at = next(i for i, e in enumerate(events) if e["event"] == "fault")
  store = {**events[at], "kind": "store_lost", "ranks": [], "affected": []}
  leaving = {**events[at], "kind": "rank_leaving"}
  stuck = {**events[at], "kind": "rank_stuck", "ranks": [2, 3]}
  line = _line(tmp_path, [*events[:at], store, leaving, stuck, *events[at:]])
  assert (line.faults, line.kills) == (4, 1 + 0 + 2 + 1)
  assert line.detect_s == (U, U)
  assert campaign_table.to_csv([line]).count("0.125;0.125,") == 1
  # The store's loss was not reported, and isn't a report about a rank.
  assert report.recovery_phases([*events[:at], store, *events[at:]])[
    0
  ].failure_s is None  # fmt: skip


@pytest.mark.usefixtures("process")
def test_what_is_not_reached_is_said(tmp_path):
  events = s.without(s.without(_lost(), "failure"), "redundancy")
  lines = [_line(tmp_path, _lost()), _line(tmp_path, events)]
  assert lines[1].detect_s == (None,)
  assert campaign_table.missing(lines) == [
    "kv_restore: 1 of 2 faults have no detect_s",
    "kv_restore: 1 of 2 faults have no resume_s",
    "kv_restore: 1 of 2 faults have no redundancy_s",
  ]
  text = campaign_table.to_markdown(lines, ["Measured here."])
  assert "Times that are missing: kv_restore: 1 of 2 faults" in text
  assert "Measured here." in text
  assert campaign_table.to_csv(lines[1:]).endswith(
    ",1.0,,,,rank,,7.0,6.0,again\n"
  )


@pytest.mark.usefixtures("process")
def test_the_rows_pool_the_faults_of_all_cases(tmp_path):
  slow = _lost(t=_lost()[0]["t"] + s.START_S + 3 * U + 2 * U)
  lines = [
    _line(tmp_path, _lost()),
    _line(tmp_path, slow, verdict={"overall": "false"}),
    _line(tmp_path, _lost(), policy="mesh_shrink"),
  ]
  assert [line.detect_s for line in lines] == [(U,), (2 * U,), (U,)]
  header, body = campaign_table.rows(lines)
  found = {cells[0]: dict(zip(header, cells, strict=True)) for cells in body}
  assert list(found) == ["kv_restore", "mesh_shrink", "all"]
  row = found["kv_restore"]
  assert (row["cases"], row["kills"], row["verdict_true"]) == ("2", "2", "1")
  assert row["exact_outputs"] == "4/4"
  assert row["detect_p50"] == f"{1.5 * U:.3g}"
  assert row["detect_p99"] == f"{1.99 * U:.3g}"
  assert row["resume_p50"] == f"{4.5 * U:.3g}"
  assert row["redundancy_p99"] == "1.12"
  assert found["all"]["cases"] == "3"
  assert found["all"]["detect_p50"] == f"{U:.3g}"
  tex = campaign_table.to_latex(lines)
  assert (
    r"kv\_restore & collocated & 2 & 2 & 2 & 1 & 0 & 0 & 0 & 4/4 & 0.188"
  ) in tex
  assert tex.count("\\midrule") == 3


APART = {"deployment": "disaggregated", "ranks": 6, "attention": 2}


def _struck(tmp_path, ranks, affected, **case):
  events = s.edited(_lost(), "fault", 0, ranks=ranks, affected=affected)
  events = s.edited(events, "failure", 0, ranks=ranks)
  return _line(tmp_path, events, **APART | case)


@pytest.mark.usefixtures("process")
def test_the_roles_struck_are_told_apart(tmp_path):
  lines = [
    _struck(tmp_path, [1], [1]),
    _struck(tmp_path, [3], [1, 2]),
    _struck(tmp_path, [1, 3], [1, 2]),
    _struck(tmp_path, [3], [1, 2], policy="tarragon"),
    _line(tmp_path, _lost()),
  ]
  assert [line.struck for line in lines] == [
    ("AW",), ("EW",), ("AW+EW",), ("EW",), ("rank",)
  ]  # fmt: skip
  header, body = campaign_faults.rows(lines)
  assert [cells[:4] for cells in body] == [
    ["kv_restore", "disaggregated", "AW", "1"],
    ["kv_restore", "disaggregated", "EW", "1"],
    ["kv_restore", "disaggregated", "AW+EW", "1"],
    ["tarragon", "disaggregated", "EW", "1"],
    ["kv_restore", "collocated", "rank", "1"],
  ]
  row = dict(zip(header, body[0], strict=True))
  assert row["detect_ms_p50"] == f"{1e3 * U:.3g}"
  assert row["resume_ms_p99"] == f"{5e3 * U:.3g}"
  assert row["resume_steps_p50"] == "5"
  # Request 1 goes on 7 gaps after its last token, request 2 after 6.
  assert (row["own_wait_gaps_p50"], row["others_wait_gaps_p50"]) == ("7", "6")
  row = dict(zip(header, body[1], strict=True))
  assert (row["own_wait_gaps_p99"], row["others_wait_gaps_p99"]) == ("7", "-")
  text = campaign_table.to_markdown(lines, [])
  assert "| kv_restore | disaggregated | AW+EW  |      1 |" in text
  assert campaign_faults.NOTES in text
  tex = campaign_table.to_latex(lines)
  assert tex.count(r"\begin{tabular}{lll") == 1
  assert tex.count(r"\end{tabular}") == 2


@pytest.mark.usefixtures("process")
def test_deployments_have_rows_of_their_own(tmp_path):
  lines = [_line(tmp_path, _lost()), _struck(tmp_path, [1], [1])]
  header, body = campaign_table.rows(lines)
  assert header[:3] == ["policy", "deployment", "cases"]
  assert [cells[:3] for cells in body] == [
    ["kv_restore", "collocated", "1"],
    ["all", "collocated", "1"],
    ["kv_restore", "disaggregated", "1"],
    ["all", "disaggregated", "1"],
    ["all", "all", "2"],
  ]


@pytest.mark.usefixtures("process")
def test_a_fault_that_struck_no_rank_has_no_place(tmp_path):
  events = _lost()
  at = next(i for i, e in enumerate(events) if e["event"] == "fault")
  cut = {**events[at], "kind": "link_cut", "ranks": [1, 3]}
  line = _line(tmp_path, [*events[:at], cut, *events[at:]], **APART)
  assert (line.faults, line.struck) == (2, ("EW",))
  assert (len(line.own_gaps), len(line.resume_steps)) == (1, 1)


def test_changed_and_repeated_tokens_are_counted():
  events = s.recovered()
  assert exactness.changed_tokens(events, s.twin()) == 0
  steps = [e["emitted"] for e in events if e["event"] == "step"]
  request, position, token = steps[4][0]
  other = [[request, position, token + 1]]
  changed = s.edited(events, "step", 4, emitted=other)
  assert exactness.changed_tokens(changed, s.twin()) == 1
  beyond = s.edited(events, "step", 4, emitted=[[request, 99, token]])
  assert exactness.changed_tokens(beyond, s.twin()) == 1
  again = s.edited(events, "step", 4, emitted=[*steps[4], *steps[0], *steps[0]])
  assert exactness.repeated_tokens(events) == 0
  assert exactness.repeated_tokens(again) == 2 * len(steps[0])
  # What a client's retry gets again is another request's.
  assert exactness.repeated_tokens(s.retried()) == 0
