"""Each request around a fault: times counted by hand in `synthetic.py`."""

import math

import pytest

from resilient_moe import report
from resilient_moe.report import stalls
from tests.report import synthetic as s

U = s.STEP_S


def _steps(times) -> list[float | None]:
  """Times as steps since the first one began."""
  return [None if t is None else (t - s.START_S) / U for t in times]


def _by_id(events, around: float = 100, twin=None):
  found = report.request_timelines(events, around * U, twin)
  return {each.request_id: each for each in found}


def test_a_fault_with_one_affected_request() -> None:
  first, second = report.request_timelines(s.recovered(), 100 * U)
  assert (first.request_id, second.request_id) == (1, 2)
  assert (first.affected, second.affected) == (True, False)
  assert first.fault["t"] == second.fault["t"] == s.START_S + 3 * U
  assert _steps(first.tokens_s) == [1, 2, 3, 10, 11, 13, 14, 15]
  assert _steps(second.tokens_s) == [1, 2, 3, 9, 10, 11, 13, 14]
  assert _steps([first.last_before_s, first.first_after_s]) == [3, 10]
  assert _steps([second.last_before_s, second.first_after_s]) == [3, 9]
  assert _steps(first.gap_s) == [3, 10]
  assert _steps(second.gap_s) == [3, 9]
  assert first.usual_s == U
  assert (first.stall_s, first.stall_gaps) == (6 * U, 6)
  assert (second.stall_s, second.stall_gaps) == (5 * U, 5)
  assert not first.open
  assert not second.open


def test_when_it_was_paused_moved_and_resumed() -> None:
  found = _by_id(s.recovered())
  handled = [found[1].paused_s, found[1].moved_s, found[1].resumed_s]
  assert _steps(handled) == [5, 8, 8]
  assert found[1].moved == "recompute"
  handled = [found[2].paused_s, found[2].moved_s, found[2].resumed_s]
  assert _steps(handled) == [5, None, 8]
  assert found[2].moved is None
  alone = s.edited(s.recovered(), "plan", 0, paused=[1])
  found = _by_id(s.edited(alone, "resumed", 0, paused=[1]))
  assert (found[2].paused_s, found[2].resumed_s) == (None, None)
  assert found[1].paused_s is not None


def test_a_usual_gap_is_the_twins_if_there_is_one() -> None:
  slow = s.Builder("none")
  slow.accept(1)
  for _ in range(4):
    slow.step(1, seconds=2 * U)
  found = _by_id(s.recovered(), twin=slow.end())[1]
  assert (found.usual_s, found.stall_s, found.stall_gaps) == (2 * U, 5 * U, 2.5)


def test_the_window_cuts_tokens_and_no_gap() -> None:
  found = _by_id(s.recovered(), around=1)[1]
  assert _steps(found.tokens_s) == [2, 3]
  assert _steps(found.window_s) == [2, 4]
  assert _steps(found.gap_s) == [3, 10]
  assert _steps([found.first_after_s]) == [10]


def test_later_gaps_count_if_they_start_within_the_window() -> None:
  b = s.Builder()
  b.accept(1)
  for seconds in (U, U, U):
    b.step(1, seconds=seconds)
  b.fault(1)
  b.step(1, seconds=2 * U)
  b.step(1)
  b.write("admitted", request_id=1, rank=2, row=0, step=5)
  b.step(1, seconds=5 * U)
  b.step(1)
  b.finish(1)
  found = _by_id(b.end(), around=4)[1]
  assert (_steps(found.gap_s), found.rank_after) == ([6, 11], 2)
  found = _by_id(b.end(), around=2)[1]
  assert found.rank_after == 0
  assert _steps(found.gap_s) == [3, 5]
  assert _steps([found.last_before_s, found.first_after_s]) == [3, 5]


@pytest.mark.parametrize("events", [s.recovered(), s.retried()])
@pytest.mark.parametrize("around", [0.5, 100])
def test_gaps_are_those_of_the_tables(events, around) -> None:
  (told,) = stalls.fault_stalls(events, stalls.usual(events, None), around * U)
  found = report.request_timelines(events, around * U)
  assert told.affected_s == {
      r.request_id: r.stall_s for r in found if r.affected
  }
  assert told.unaffected_s == {
      r.request_id: r.stall_s for r in found if not r.affected
  }


def test_a_retry_is_the_same_request() -> None:
  found = _by_id(s.retried())
  assert set(found) == {1, 2}
  # The retry's first three tokens are what the client had.
  assert _steps(found[1].gap_s) == [3, 7]
  assert found[1].affected


def test_without_a_fault_there_is_nothing() -> None:
  assert report.request_timelines(s.twin(), 1.0) == []
  assert report.request_timelines([], 1.0) == []


# Requests by what becomes of them; the synthetic ones are numbered.
EARLY, LAST, RUNS, WAITS, LATER, LATEST = range(6)


def test_who_was_not_there() -> None:
  b = s.Builder()
  for name in (EARLY, LAST, RUNS):
    b.accept(name)
  b.step(EARLY, LAST, RUNS)
  b.finish(EARLY)
  for _ in range(3):
    b.step(LAST, RUNS)
  b.finish(LAST)  # at the very time of the fault
  b.accept(WAITS)
  b.fault(RUNS)
  b.step(RUNS)
  b.accept(LATER)
  for _ in range(6):
    b.step(RUNS, LATER, WAITS)
  b.accept(LATEST)
  b.step(RUNS, LATER, LATEST, WAITS)
  b.finish(RUNS, LATER, LATEST, WAITS)
  found = _by_id(b.end(), around=2.5)
  assert list(found) == [RUNS, LAST, WAITS, LATER]  # the affected first
  assert EARLY in _by_id(b.end(), around=5)
  assert LATEST in _by_id(b.end(), around=8)
  for name in (LAST, WAITS, LATER):
    assert found[name].gap_s is None
    assert (found[name].stall_s, found[name].stall_gaps) == (None, None)
    assert not found[name].open
  assert (found[LAST].rank_before, found[LAST].rank_after) == (None, None)
  assert _steps([found[LAST].last_before_s]) == [4]
  assert (found[LATER].rank_before, found[LATER].rank_after) == (None, 0)
  assert found[LATER].last_before_s is None
  assert _steps(found[LATER].tokens_s) == [6]


def test_one_that_lost_its_prefill_waits_from_the_fault_on() -> None:
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  b.step(2)
  b.fault(1)
  b.step(2)
  b.step(1, 2)
  b.finish(1, 2)
  found = _by_id(b.end())
  assert _steps(found[1].gap_s) == [1, 3]
  assert (found[1].last_before_s, found[1].open) == (None, False)


def test_one_that_never_goes_on_waits_to_the_end() -> None:
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  for _ in range(3):
    b.step(1, 2)
  b.fault(1)
  b.write("failed", request_id=1, reason="lost")
  for _ in range(4):
    b.step(2)
  b.finish(2)
  found = _by_id(b.end())[1]
  assert found.gap_s is None  # ended at the fault: no client waited
  found = _by_id(s.without(b.end(), "failed"))[1]
  assert found.open
  assert _steps(found.gap_s) == [3, 7]
  assert (found.first_after_s, found.rank_after) == (None, None)
  assert found.stall_s == 3 * U


def test_a_lost_rank_affects_who_sat_there_unless_it_is_only_slow() -> None:
  for kind, lost in (("rank_lost", True), ("rank_slow", False)):
    events = s.edited(s.recovered(), "fault", 0, affected=[])
    next(e for e in events if e["event"] == "fault")["kind"] = kind
    events = s.edited(events, "admitted", 1, rank=3)
    found = _by_id(events)
    assert (found[1].affected, found[2].affected) == (False, lost)
    assert found[2].rank_before == 3
    assert found[1].rank_before == 0


def _ranks(events) -> tuple:
  found = _by_id(events)[1]
  return found.rank_before, found.rank_after


def test_the_rank_after() -> None:
  events = s.edited(s.recovered(), "admitted", 0, rank=3)
  assert _ranks(events) == (3, None)  # moved, and nothing tells where to
  assert _by_id(events)[2].rank_after == 0  # stayed
  told = s.edited(events, "requests_moved", 0, to=[2])
  assert _ranks(told) == (3, 2)
  at = next(i for i, e in enumerate(events) if e["event"] == "requests_moved")
  action = next(e for e in events if e["event"] == "action") | {
      "t": events[at]["t"], "name": "RestoreKV",
      "explain": "restore KV of 2 requests: 1->1, 2->0 (tier peer)",
  }  # fmt: skip
  assert _ranks([*events[: at + 1], action, *events[at + 1 :]]) == (3, 1)
  # Experts move as well, and their numbers are no requests.
  copy = action | {"name": "CopyExperts", "explain": "copy: 1->1.8"}
  assert _ranks([*events[: at + 1], copy, *events[at + 1 :]]) == (3, None)
  # Back in the queue, and admitted elsewhere.
  seat = next(e for e in events if e["event"] == "admitted")
  seat = seat | {"t": events[at]["t"] + U, "rank": 1}
  assert _ranks([*events[: at + 2], seat, *events[at + 2 :]]) == (3, 1)
  # What happens later, as when another fault strikes, is not of this gap.
  later = seat | {"t": s.START_S + 14 * U, "rank": 2}
  assert _ranks([*told[:-2], later, *told[-2:]]) == (3, 2)
  later["rank"] = 0
  assert _ranks([*told[:-2], later, *told[-2:]]) == (3, 2)


def _twice() -> list:
  """Units: faults at 2 and 5; request 1 is hit first, then request 2."""
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  for _ in range(2):
    b.step(1, 2)
  for hit, ranks in ((1, (3,)), (2, (2,))):
    b.fault(hit, ranks=ranks)
    b.now_s += U
    b.detect(ranks=ranks)
    b.plan(hit)
    b.bump()
    b.write(
        "requests_moved", kind="restore", request_ids=[hit], tokens=0, bytes=8
    )
    b.write("resumed", epoch=b.epoch, paused=[hit])
    b.step(1, 2)
    b.step(1, 2)
  b.finish(1, 2)
  return b.end()


def test_several_faults_each_with_its_own() -> None:
  found = report.request_timelines(_twice(), 100 * U)
  assert [(_steps([r.fault["t"]])[0], r.request_id) for r in found] == [
      (2, 1), (2, 2), (5, 2), (5, 1)
  ]  # fmt: skip
  assert [r.affected for r in found] == [True, False, True, False]
  assert [_steps(r.gap_s) for r in found] == [[2, 4], [2, 4], [5, 7], [5, 7]]
  assert [_steps([r.paused_s, r.moved_s, r.resumed_s]) for r in found] == [
      [3, 3, 3], [None] * 3, [6, 6, 6], [None] * 3
  ]  # fmt: skip


def test_a_fault_during_a_recovery_shares_its_gap_and_its_resumption() -> None:
  b = s.Builder()
  b.accept(1)
  b.step(1)
  b.step(1)
  b.fault(1)
  b.detect()
  b.now_s += U
  b.plan(1)
  b.now_s += U
  b.fault(1, ranks=(2,))
  b.detect(ranks=(2,))
  b.now_s += U
  b.plan(1)
  b.write("resumed", epoch=2, paused=[1])
  b.step(1)
  b.finish(1)
  found = report.request_timelines(b.end(), math.inf)
  assert [_steps(r.gap_s) for r in found] == [[2, 6], [2, 6]]
  assert [_steps([r.paused_s, r.resumed_s]) for r in found] == [[3, 5], [5, 5]]
