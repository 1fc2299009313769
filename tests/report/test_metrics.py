"""Metrics against histories that can be counted by hand."""

from typing import Any

import pytest

from resilient_moe import report
from resilient_moe.report.history import Event
from tests.report import synthetic as s

U = s.STEP_S


def _measure(events: list[Event], **kwargs: Any) -> dict[str, Any]:
  return report.measure(events, s.twin(), **kwargs)


def test_phases() -> None:
  found = _measure(s.recovered())
  assert found["detect_s"] == U
  assert found["plan_s"] == U
  assert found["resume_s"] == 4 * U  # planned at 2, request 2 goes on at 6
  assert found["redundancy_s"] == 9 * U
  assert found["step_s"] == U


@pytest.mark.parametrize("runtime", ["emulated", "logical"])
def test_detection_is_empty_where_there_is_none(runtime: str) -> None:
  assert _measure(s.recovered(runtime=runtime))["detect_s"] is None


def test_redundancy_counts_only_when_full() -> None:
  events = s.edited(s.recovered(), "redundancy", 0, full=False)
  assert _measure(events)["redundancy_s"] is None


def test_stalls_are_gaps_beyond_the_usual_one() -> None:
  found = _measure(s.recovered())
  assert found["usual_gap_s"] == U
  assert found["service_stall_s"] == (6 - 1) * U
  assert found["affected_stall_s"] == (7 - 1) * U
  assert found["affected_stall_max_s"] == (7 - 1) * U
  assert found["unaffected_stall_max_s"] == (6 - 1) * U
  assert found["service_stall_steps"] == 5
  assert found["affected_stall_steps"] == 6
  assert found["affected_stall_max_steps"] == 6
  assert found["unaffected_stall_max_steps"] == 5


def test_fault_free_runs_have_no_stalls() -> None:
  found = _measure(s.twin())
  names = ("service_stall_s", "affected_stall_s", "resume_s")
  assert [found[name] for name in names] == [None] * 3
  assert found["tokens_exact"] == 1.0


def _late_gap() -> list[Event]:
  """Request 2 pauses for 2 steps at the fault and for 20 later on."""
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  b.step(1, 2)
  b.step(1, 2)
  b.fault(1)
  b.step(1, 2, seconds=2 * U)
  b.step(1, 2)
  b.step(1, 2, seconds=20 * U)
  b.finish(1, 2)
  return b.end()


def test_the_horizon_bounds_where_a_gap_may_start() -> None:
  assert _measure(_late_gap())["affected_stall_s"] == 19 * U
  assert _measure(_late_gap(), horizon_s=2.5 * U)["affected_stall_s"] == U
  assert _measure(_late_gap(), horizon_s=2.5 * U)["service_stall_s"] == U


def test_an_idle_service_does_not_stall() -> None:
  b = s.Builder()
  b.accept(1)
  b.step(1)
  b.step(1)
  b.fault(1)
  b.step(1, seconds=3 * U)
  b.finish(1)
  b.now_s += 50 * U  # nobody waits
  b.accept(2)
  b.step(2)
  b.finish(2)
  assert _measure(b.end())["service_stall_s"] == 2 * U


def test_an_answer_that_never_goes_on_stalls_to_the_end() -> None:
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  b.step(1, 2)
  b.fault(1)
  for _ in range(9):
    b.step(2)
  b.finish(2)
  found = _measure(b.end())
  assert found["affected_stall_s"] == 8 * U
  assert found["requests_lost"] == 1
  assert found["tokens_exact"] == 0.0  # of 8 tokens each, neither is whole


def test_a_request_lost_in_prefill_stalls_from_the_fault() -> None:
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  b.step(2)
  b.step(2)
  b.fault(1)
  b.step(2)
  b.step(2)
  b.step(1, 2)
  b.finish(1, 2)
  found = _measure(b.end())
  assert found["affected_stall_s"] == 2 * U
  assert found["unaffected_stall_max_s"] == 0.0


def test_a_queued_request_is_not_stalled() -> None:
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  b.step(1)
  b.fault(1)
  for _ in range(5):
    b.step(1)
  b.step(1, 2)
  b.finish(1, 2)
  assert _measure(b.end())["unaffected_stall_max_s"] is None


def test_a_retry_makes_progress_only_beyond_what_its_client_had() -> None:
  # Three tokens were out; the retry's fourth comes four steps later.
  assert _measure(s.retried())["affected_stall_s"] == (4 - 1) * U
  # The repeated tokens are no time between tokens either.
  assert max(report.samples(s.retried(), s.twin()).tbt_s) == 9 * U


def _two_faults() -> list[Event]:
  """Gaps of 3 (request 1) and then 5 steps (request 2)."""
  b = s.Builder()
  b.accept(1)
  b.accept(2)
  b.step(1, 2)
  b.step(1, 2)
  b.fault(1, ranks=(3,))
  b.detect((3,))
  b.plan(1)
  b.act("CopyExperts", U)
  b.step(1, 2, seconds=2 * U)
  b.fault(2, ranks=(2,))
  b.detect((2,))
  b.plan(2)
  b.act("CopyExperts", 3 * U)
  b.step(1, 2, seconds=2 * U)
  b.finish(1, 2)
  return b.end()


def test_several_faults() -> None:
  found = _measure(_two_faults())
  assert found["affected_stall_max_s"] == 4 * U
  assert found["affected_stall_s"] == 3 * U  # median of 2 and 4
  assert found["resume_s"] == 4 * U  # median of 3 and 5
  assert [each.service_s for each in report.fault_stalls(
      _two_faults(), report.usual(_two_faults(), s.twin())
  )] == [2 * U, 4 * U]  # fmt: skip


def test_the_stall_by_action_adds_up() -> None:
  events = s.recovered()
  norm = report.usual(events, s.twin())
  spent = report.stall_by_action(
      report.recovery_phases(events), report.fault_stalls(events, norm)
  )
  assert spent == {
      "detect+plan": 2 * U,
      "RebuildMesh": U,
      "CopyExperts": 2 * U,
      "prefill/steps": U,
  }
  assert list(spent)[-1] == "prefill/steps"
  assert sum(spent.values()) == _measure(events)["affected_stall_s"]


def test_work() -> None:
  found = _measure(s.recovered())
  assert found["tokens_recomputed"] == 6
  assert found["weight_bytes_moved"] == 1500
  assert found["kv_bytes_restored"] == 0
  moved = s.recovered()
  for event in moved:
    if event["event"] == "requests_moved":
      event.update(kind="restore", bytes=8)
  assert _measure(moved)["kv_bytes_restored"] == 8


def test_prepare_counts_what_stood_before_the_fault() -> None:
  fields = {"seconds": 2.0, "redundancy_bytes": 9, "ready_meshes": 4}
  more = {"checkpoint": "none", "spares": 0}
  prepare = {"event": "prepare", "t": 0.5, **fields, **more}
  events = s.recovered()
  late = {**prepare, "t": events[-1]["t"], "seconds": 7.0}
  found = _measure([events[0], prepare, *events[1:-1], late, events[-1]])
  assert found["prepare_s"] == 2.0
  assert found["redundancy_bytes"] == 9
  assert found["ready_meshes"] == 4


def test_lost_and_exact_requests() -> None:
  events = s.recovered()
  changed = s.edited(events, "step", 6, emitted=[[1, 8, 99], [2, 9, 23]])
  assert _measure(changed)["tokens_exact"] == 0.5
  assert _measure(changed)["requests_lost"] == 0
  assert report.measure(events)["tokens_exact"] is None
  cut = s.without(events, "finished")
  for found in (_measure(cut), report.measure(cut)):
    assert found["requests_lost"] == 2
