"""Latency, goodput, speedups and the restart's stages, counted by hand."""

from typing import Any

from resilient_moe import report
from resilient_moe.report.history import Event
from tests.report import synthetic as s

U = s.STEP_S


def _measure(events: list[Event], **kwargs: Any) -> dict[str, Any]:
  return report.measure(events, s.twin(), **kwargs)


def test_latency_and_goodput() -> None:
  found = _measure(s.twin(), ttft_slo_s=U, tbt_slo_s=U)
  assert found["ttft_p50"] == found["ttft_p99"] == U
  assert found["tbt_p50"] == found["tbt_p99"] == U
  assert found["goodput_tokens_per_s"] == 2 / U
  assert report.goodput(s.twin(), U / 2, U) == 0.0
  assert report.goodput(s.twin(), U, U / 2) == 0.0


def test_speedups() -> None:
  fast, slow = _measure(s.recovered()), _measure(s.recovered())
  slow["affected_stall_s"] = 60 * U
  found = report.speedups(fast, slow)
  assert found["affected_speedup_vs_restart"] == 10.0
  assert found["service_speedup_vs_restart"] == 1.0
  # A stall below one usual gap counts as one: no infinite speedups.
  fast["affected_stall_s"] = 0.0
  found = report.speedups(fast, slow)
  assert found["affected_speedup_vs_restart"] == 60.0
  assert set(report.speedups(fast, None).values()) == {None}


def test_restart_stages_and_recovery_time() -> None:
  events = s.recovered()
  for generation in (0, 1):
    for seconds in (1.0, 2.0):
      events.insert(
          -1,
          {
              "event": "engine",
              "t": 9.0,
              "stage": "weights",
              "seconds": seconds + generation,
              "generation": generation,
          },
      )
  assert report.restart_stages(events) == {"weights": 5.0}
  assert report.recovery_time_s(events) == 7 * U
