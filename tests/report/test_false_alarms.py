"""Failures that no fault explains are counted, and only those."""

from resilient_moe.report.metrics import measure
from resilient_moe.report.phases import false_alarms


def run(*events):
  """A history of a run on processes."""
  first = {
    "event": "run", "t": 0.0, "policy": "kv_restore", "scenario": "x",
    "runtime": "process", "deployment": "collocated", "seed": 0, "ranks": 4,
    "lossless": True, "fails_requests": False, "exact": True,
  }  # fmt: skip
  return [first, *events]


def fault(t, *ranks):
  return {
    "event": "fault", "t": t, "kind": "rank_lost", "ranks": list(ranks),
    "phase": "decode", "step": 1, "affected": [],
  }  # fmt: skip


def failure(t, *ranks):
  return {
    "event": "failure", "t": t, "kind": "RanksLost", "ranks": list(ranks),
    "epoch": 0,
  }  # fmt: skip


def test_a_failure_without_a_fault_is_a_false_alarm():
  assert false_alarms(run(failure(1.0, 2))) == 1
  assert false_alarms(run(fault(0.5, 1), failure(1.0, 2))) == 1
  assert false_alarms(run(failure(1.0, 2), fault(1.5, 2))) == 1


def test_reported_faults_are_none_however_they_are_reported():
  assert false_alarms(run()) == 0
  assert false_alarms(run(fault(0.5, 1), failure(0.6, 1))) == 0
  both = run(fault(0.5, 1, 3), failure(0.6, 1), failure(0.7, 3))
  assert false_alarms(both) == 0
  merged = run(fault(0.5, 1), fault(0.5, 3), failure(0.6, 1, 3))
  assert false_alarms(merged) == 0


def test_an_emulation_has_no_detector_to_be_wrong():
  events = run(failure(1.0, 2))
  assert measure(events)["false_alarms"] == 1
  events[0]["runtime"] = "emulated"
  assert measure(events)["false_alarms"] is None
