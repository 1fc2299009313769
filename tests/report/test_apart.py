"""Where ranks step apart: medians, healing, bytes, and who goes on."""

from typing import Any

import pytest

from resilient_moe import report
from resilient_moe.report.history import Event, of_kind
from resilient_moe.report.traffic import healing_times
from tests.report import apart
from tests.report import synthetic as s

U = s.STEP_S


def _confined(events: list[Event]) -> tuple[str, str]:
  found = report.verdict(events)["checkers"]["confined"]
  return found["value"], found["reason"]


def _insert(events: list[Event], after: str, **event: Any) -> list[Event]:
  """Adds an event `t` seconds behind the first one of a kind."""
  at = next(i for i, e in enumerate(events) if e["event"] == after)
  event["t"] = events[at]["t"] + event.get("t", 0.0)
  return sorted([*events, event], key=lambda e: e["t"])


def _healed(rank: int, t: float) -> dict[str, Any]:
  return {"event": "healed", "by": 0, "rank": rank, "layer": 1, "experts": 2,
          "seconds": 0.01, "t": t}  # fmt: skip


def test_steps_and_gaps_are_those_of_a_rank_and_not_of_all() -> None:
  found = report.measure(apart.lost())
  # Somebody's step ends every U, and each takes 2 U.
  assert found["step_s"] == 2 * U
  assert found["usual_gap_s"] == 2 * U
  assert found["usual_service_gap_s"] == U


def test_the_requests_of_another_rank_are_not_affected() -> None:
  found = report.measure(apart.lost())
  assert found["affected_stall_s"] == (10 + 2 - 2) * U
  assert found["affected_stall_steps"] == 5
  assert found["unaffected_stall_max_s"] == U  # 3 U: its rank had the turn
  stopped = report.measure(apart.lost(goes_on=False))
  assert stopped["unaffected_stall_max_s"] == (10 + 2 + 1 - 2) * U


def test_healing_counts_from_the_fault_that_made_it_needed() -> None:
  events = apart.lost()
  assert report.measure(events)["healed_s"] is None
  events = _insert(events, "fault", **_healed(1, 3 * U))
  events = _insert(events, "fault", **_healed(1, 2 * U))
  events = _insert(events, "fault", **_healed(5, U))  # of another rank
  events = _insert(events, "fault", **_healed(1, -U))  # before
  assert report.measure(events)["healed_s"] == 2 * U


def test_a_rank_that_is_lost_twice_is_healed_from_twice() -> None:
  events = apart.lost()
  again = {**of_kind(events, "fault")[0], "t": 5 * U}
  events = _insert(events, "fault", **again)
  events = _insert(events, "fault", **_healed(1, 6 * U))
  assert healing_times(events) == [None, U]
  events = _insert(events, "fault", **_healed(1, 3 * U))
  assert healing_times(events) == [3 * U, U]


def test_bytes_on_the_links_are_compared() -> None:
  events = apart.lost()
  found = report.measure(events)
  assert found["exchange_bytes"] is found["checkpoint_ratio"] is None
  moved = {"event": "exchange", "sent_bytes": 300, "returned_bytes": 500}
  events = _insert(events, "end", **moved)
  assert report.measure(events)["exchange_bytes"] == 800
  assert report.measure(events)["checkpoint_ratio"] is None
  saved = {"event": "checkpoint", "bytes_total": 200, "lag_steps": 0}
  found = report.measure(_insert(events, "end", **saved))
  assert (found["checkpoint_bytes"], found["checkpoint_ratio"]) == (200, 0.25)
  # A restarted engine counts from zero.
  again = _insert(events, "end", **moved)
  assert report.measure(again)["exchange_bytes"] == 1600


def test_tables_of_ranks_apart_have_columns_of_their_own(tmp_path: Any) -> None:
  s.store(tmp_path / "a", apart.lost(), None)
  (tmp_path / "b").mkdir()
  s.store(tmp_path / "b", s.recovered(), None)
  texts = {}
  for name in "ab":
    report.write_tables(tmp_path / name)
    texts[name] = [
        (tmp_path / name / f"table.{ext}").read_text() for ext in ("md", "tex")
    ]
  assert all("checkpoint" in text for text in texts["a"])
  assert not any("checkpoint" in text for text in texts["b"])


def test_who_is_not_named_goes_on() -> None:
  value, reason = _confined(apart.lost())
  assert (value, reason) == ("true", "2 requests went on in 1 recoveries")


def test_a_pause_of_everybody_is_seen() -> None:
  value, reason = _confined(apart.lost(goes_on=False))
  assert value == "unknown"
  assert "names none of [1, 2]" in reason
  assert "confined" in report.verdict(apart.lost(goes_on=False))["failed"]


@pytest.mark.parametrize(
    "change",
    [
        lambda e: s.edited(e, "plan", 0, paused=[1, 2, 3, 4]),
        lambda e: s.edited(e, "fault", 0, affected=[1, 2, 3, 4]),
        lambda e: s.without(e, "resumed"),
        lambda e: s.edited(e, "run", 0, runtime="emulated"),
        lambda e: s.edited(e, "run", 0, deployment="collocated"),
        # Queued by an earlier plan, they have no row yet.
        lambda e: s.edited(e, "requests_moved", 0, request_ids=[1, 2]),
        lambda e: _insert(e, "plan", event="engine", stage="spawn", seconds=U,
                          generation=1),
    ],
    ids=["paused", "hit", "not over", "one process", "one mesh", "moved",
         "restart"],
)  # fmt: skip
def test_a_pause_that_is_due_is_none(change: Any) -> None:
  value, reason = _confined(change(apart.lost(goes_on=False)))
  assert value == "not applicable", reason


def test_what_is_short_or_usual_here_is_no_pause() -> None:
  short = apart.lost(goes_on=False, wait=8)  # 4 gaps: not more
  assert _confined(short)[0] == "not applicable"
  assert _confined(apart.lost(goes_on=False, wait=9))[0] == "unknown"
  # The machine had stopped them for as long before.
  events = apart.lost(goes_on=False)
  early = [
      {**e, "t": e["t"] - 6 * U} if e["t"] < s.START_S + 11 * U else e
      for e in events
  ]
  assert _confined(early)[0] == "not applicable"


def test_a_fault_after_the_report_belongs_to_the_next_recovery() -> None:
  events = apart.lost(goes_on=False)
  fault = of_kind(events, "fault")[0]
  ew = {**fault, "ranks": [4], "affected": [1, 2, 3, 4], "t": 2 * U}
  assert _confined(_insert(events, "fault", **ew))[0] == "not applicable"
  # What had struck before and is over excuses nobody.
  old = {**ew, "t": -6 * U}
  over = {"event": "resumed", "epoch": 0, "paused": [], "t": -4 * U}
  events = _insert(events, "fault", **old)
  failed = {**of_kind(events, "failure")[0], "t": U}
  events = _insert(events, "fault", **failed)
  events = _insert(events, "fault", **{**over, "t": 2 * U})
  assert _confined(events)[0] == "unknown"
