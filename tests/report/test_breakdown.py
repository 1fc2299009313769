"""Stacked bars of a stall: what their pieces add up to."""

import pytest

from resilient_moe.report import breakdown, style
from resilient_moe.report.curves import KINDS
from resilient_moe.report.rows import Row

QUICK = {"detect+plan": 0.01, "CopyExperts": 0.02, "prefill/steps": 0.03}
RESTART = {"detect+plan": 0.1, "RestartInstance": 5.0, "prefill/steps": 1.0}


def _row(policy: str, spent: dict, stages: dict | None = None) -> Row:
  stats = {"affected_stall_s": None}
  return Row(
      "one_rank", policy, "emulated", "collocated", 1, "true", (), stats,
      spent, stages or {},
  )  # fmt: skip


def _seconds(row: Row) -> dict[str, float]:
  return {part.name: part.seconds for part in breakdown.parts(row)}


def test_a_restart_is_broken_down_into_its_stages() -> None:
  row = _row("restart", RESTART, {"spawn": 1.0, "weights": 3.0})
  assert _seconds(row) == {
      "detect+plan": 0.1, "spawn": 1.0, "weights": 3.0, "restart, other": 1.0,
      "prefill/steps": 1.0,
  }  # fmt: skip


def test_stages_that_outlast_the_restart_do_not_make_the_bar_longer() -> None:
  row = _row("restart", RESTART, {"spawn": 3.0, "first_step": 2.5})
  assert sum(_seconds(row).values()) == pytest.approx(6.1)
  assert _seconds(row)["prefill/steps"] == 0.5


def test_what_takes_long_gets_a_scale_of_its_own() -> None:
  bars = {
      name: breakdown.parts(_row(name, spent))
      for name, spent in (("a", QUICK), ("restart", RESTART), ("b", QUICK))
  }
  assert breakdown.scales(bars) == [["a", "b"], ["restart"]]
  assert breakdown.scales({"a": bars["a"], "b": bars["b"]}) == [["a", "b"]]


def test_no_two_actions_look_alike() -> None:
  row = _row("p", dict.fromkeys([*KINDS, "Verify", "detect+plan"], 1.0))
  looks = breakdown._looks([breakdown.parts(row)])
  assert len(set(looks.values())) == len(looks) == len(KINDS) + 2


def test_every_bar_ends_at_the_stall_that_it_shows() -> None:
  rows = [_row("a", QUICK), _row("b", RESTART), _row("none", {})]
  with style.context():
    figure = breakdown.breakdown_figure(rows)
  ends = [
      max(p.get_x() + p.get_width() for p in axis.patches)
      for axis in figure.axes
  ]
  assert ends == pytest.approx([60, 6.1])  # ms, s
  assert [a.get_xlabel()[-4:] for a in figure.axes] == ["(ms)", " (s)"]
  with style.context():
    assert breakdown.breakdown_figure([_row("none", {})]) is None
