"""Figures and the text before and after a fault."""

import pathlib

import numpy as np
import pytest

from resilient_moe import report
from resilient_moe.report import curves, figures, runs
from tests.report import synthetic as s

U = s.STEP_S


def _curve(events: list, overall: str = "true") -> curves.Curve:
  judged = {"overall": overall, "failed": ["fencing"]}
  run = runs.Run("one_rank", "p", "0", events, judged)
  found = curves.curve(run)
  assert found is not None
  return found


def test_rates_are_zero_in_a_stall_and_right_outside() -> None:
  found = _curve(s.recovered())
  edges = np.arange(-3, 9) * U
  rate = found.rate(edges) * U  # tokens a step
  assert rate.tolist() == [2, 2, 2, 0, 0, 0, 0, 0, 1, 2, 2]


def test_bins_that_fit_no_whole_number_of_steps_do_not_ripple() -> None:
  found = _curve(s.recovered())
  rate = found.rate(np.linspace(-2.7, -0.1, 8) * U) * U
  assert np.allclose(rate, 2)


def test_stages_and_spans() -> None:
  found = _curve(s.recovered())
  assert dict(found.stages) == {
      "plan ready": 2 * U,
      "first token of a paused request": 6 * U,
      "redundancy restored": 9 * U,
  }
  assert found.spans == (
      curves.Span(0.0, 2 * U, "detect, plan", False),
      curves.Span(2 * U, U, "mesh, programs", False),
      curves.Span(3 * U, 2 * U, "experts", False),
      curves.Span(8 * U, U, "experts", True),
  )
  assert found.recovered_s == 7 * U
  assert not found.failed
  assert _curve(s.recovered(), "false").failed == ("fencing",)


def test_every_action_has_a_kind() -> None:
  actions = pytest.importorskip("resilient_moe.recovery.actions")
  ours = {action.__name__ for action in actions.ACTIONS}
  assert ours - curves.KINDS.keys() <= {"Verify"}


def test_a_close_up_only_where_it_is_needed() -> None:
  found = _curve(s.recovered())
  assert len(curves.windows([found, found])) == 1
  slow = s.recovered()
  for event in slow:
    if event["t"] > 5 * U + s.START_S:
      event["t"] += 100
  close, whole = curves.windows([found, _curve(slow)])
  assert close[1] < 20 * U < 100 < whole[1]


def test_timeline(tmp_path: pathlib.Path) -> None:
  quiet = s.twin()
  s.store(tmp_path, quiet, None)
  assert report.timeline(tmp_path) == []
  s.store(tmp_path, s.recovered(), quiet)
  s.store(tmp_path, s.without(s.recovered("bad"), "finished"), quiet)
  s.store(tmp_path, s.recovered(scenario="two"), quiet)
  names = [path.name for path in report.timeline(tmp_path)]
  assert names == [
      "timeline.png", "timeline.pdf", "timeline-two.png", "timeline-two.pdf"
  ]  # fmt: skip
  assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "timeline.pdf").read_bytes().startswith(b"%PDF")
  assert not list(tmp_path.glob(".*"))


def test_the_fault_free_line_meets_the_run_at_its_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  # The twin prepared for less long: its clock says other things.
  quiet = s.twin()
  for event in quiet:
    event["t"] -= 0.5
  all_runs = [
      runs.Run("one_rank", name, "0", events, {"overall": "true"})
      for name, events in (("none", quiet), ("p", s.recovered()))
  ]
  drawn = []
  monkeypatch.setattr(
      figures, "_panels", lambda curves, twins: drawn.append((curves, twins))
  )
  figures.timeline_figure(all_runs, "one_rank")
  ((curve,), (twin,)) = drawn[0]
  edges = np.arange(-3, 4) * U
  assert (curve.rate(edges)[:3] == twin.rate(edges)[:3]).all()
  assert (twin.rate(edges)[3:] * U).tolist() == [2, 2, 2]


def _decode(tokens: list[int]) -> str:
  return " ".join(map(str, tokens))


def test_text_before_and_after() -> None:
  found = report.before_and_after(s.recovered(), _decode)
  assert found == (1, "1 1 1", "10 11 12", "13 14 15 16 17")
  # A retry goes on where its client's text broke off.
  assert report.before_and_after(s.retried(), _decode, 1) == found
  assert report.before_and_after(s.retried(), _decode, "1b") == found


def test_text_of_a_request_that_was_not_hit() -> None:
  with pytest.raises(ValueError, match=r"request 2 was not hit.*: 1$"):
    report.before_and_after(s.recovered(), _decode, 2)
  with pytest.raises(ValueError, match="that were: none"):
    report.before_and_after(s.twin(), _decode)
