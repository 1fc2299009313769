"""Every checker is shown broken histories, and says so."""

from collections.abc import Callable

import pytest

from resilient_moe import report
from resilient_moe.report.history import Event
from tests.report import synthetic as s
from tests.report.broken import BROKEN, insert


def _value(events: list[Event], checker: str) -> str:
  found = report.verdict(events, s.twin())["checkers"][checker]
  assert found["reason"]
  return found["value"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_histories_are_caught(name: str) -> None:
  checker, change = BROKEN[name]
  assert _value(s.recovered(), checker) == "true"
  broken = change(s.recovered())
  assert _value(broken, checker) == "false"
  found = report.verdict(broken, s.twin())
  assert found["overall"] == "false"
  assert checker in found["failed"]


@pytest.mark.parametrize("make", [s.twin, s.recovered, s.retried])
def test_good_histories_pass(make: Callable[[], list[Event]]) -> None:
  found = report.verdict(make(), s.twin())
  assert found["overall"] == "true", found
  assert found["failed"] == []


def test_a_repeated_position_is_named() -> None:
  broken = BROKEN["emitted twice"][1](s.recovered())
  found = report.verdict(broken, s.twin())["checkers"]["immutability"]
  assert "request 1 position 3 emitted twice" in found["reason"]


def test_broken_histories_cover_all_checkers() -> None:
  shown = {checker for checker, _ in BROKEN.values()}
  # What never says `false` has tests of its own.
  assert shown == set(report.CHECKERS) - {"confined"}


def test_refused_requests_and_stale_work_are_fine() -> None:
  events = insert("shed", "accepted", request_id=9, reason="too long")(
      s.recovered()
  )
  events = insert("stale", "step", epoch=0, rank=3)(events)
  events = insert("step_failed", "step", epoch=0, step=3)(events)
  assert report.verdict(events, s.twin())["overall"] == "true"


def test_a_request_may_be_in_flight_before_the_end() -> None:
  events = s.without(s.without(s.recovered(), "finished"), "end")
  assert _value(events, "accounting") == "true"


def test_shed_after_acceptance_needs_a_reason() -> None:
  def shed(reason: str) -> list[Event]:
    change = insert("shed", "step", request_id=7, reason=reason)
    accept = insert(
        "accepted", "run", request_id=7, prompt_tokens=[7], max_new_tokens=1
    )
    return change(accept(s.recovered()))

  assert _value(shed("no room"), "accounting") == "true"
  assert _value(shed(""), "accounting") == "false"


def test_a_retry_must_finish_and_be_allowed() -> None:
  allowed = s.retried()
  assert _value(allowed, "accounting") == "true"
  refused = s.edited(allowed, "run", 0, fails_requests=False)
  assert _value(refused, "accounting") == "false"
  shed = [
      {"event": "shed", "t": e["t"], "request_id": "1b", "reason": "full"}
      if e["event"] == "finished" and e["request_id"] == "1b"
      else e
      for e in allowed
  ]
  assert _value(shed, "accounting") == "false"


def test_a_request_and_its_retry_must_not_both_be_answered() -> None:
  events = [
      {**e, "event": "finished", "reason": "length", "tokens": 3}
      if e["event"] == "failed"
      else e
      for e in s.retried()
  ]
  assert _value(events, "accounting") == "false"


def test_a_retry_is_compared_with_the_request_it_retries() -> None:
  events = s.edited(s.retried(), "step", 4, emitted=[["1b", 4, 99]])
  assert _value(events, "exactness") == "false"


def test_lossy_policies_are_not_compared() -> None:
  events = s.edited(s.recovered(), "step", 6, emitted=[[1, 8, 99], [2, 9, 23]])
  lossy = s.edited(events, "run", 0, lossless=False)
  assert _value(lossy, "exactness") == "not applicable"
  assert report.verdict(lossy, s.twin())["overall"] == "true"


@pytest.mark.parametrize(
    "twin",
    [
        None,
        s.recovered(),
        s.without(s.twin(), "end"),
        s.twin(seed=1),
        s.edited(s.twin(), "accepted", 0, prompt_tokens=[9]),
        s.without(s.twin(), "finished"),
    ],
    ids=["none", "faults", "cut", "seed", "prompt", "unfinished"],
)
def test_without_a_good_twin_exactness_is_unknown(
    twin: list[Event] | None,
) -> None:
  found = report.verdict(s.recovered(), twin)
  assert found["checkers"]["exactness"]["value"] == "unknown"
  assert found["overall"] == "unknown"


def test_the_twin_needs_no_twin() -> None:
  assert report.verdict(s.twin())["overall"] == "true"
  # A run called `none` in which something broke is no twin.
  faulty = s.recovered("none")
  assert report.verdict(faulty)["overall"] == "unknown"


def test_tolerance_needs_evidence() -> None:
  events = s.edited(s.recovered(), "step", 6, emitted=[[1, 8, 99], [2, 9, 23]])
  events = s.edited(events, "run", 0, exact=False)
  assert _value(events, "exactness") == "unknown"

  def replayed(margin: float) -> list[Event]:
    fields = {"request_id": 1, "margin": margin, "limit": 0.1}
    return insert("replayed", "step", **fields)(events)

  assert _value(replayed(0.05), "exactness") == "true (tolerance)"
  found = report.verdict(replayed(0.05), s.twin())
  assert found["overall"] == "true (tolerance)"
  assert _value(replayed(0.2), "exactness") == "false"
  assert _value(replayed(float("nan")), "exactness") == "false"


def test_a_crashed_checker_is_unknown() -> None:
  def crash(events: list[Event], twin: list[Event] | None) -> report.Verdict:
    raise RuntimeError("boom")

  found = report.verdict(s.recovered(), s.twin(), {"crash": crash})
  assert found["overall"] == "unknown"
  assert "boom" in found["checkers"]["crash"]["reason"]
  # No checker at all proves nothing either.
  assert report.verdict([], None)["overall"] in ("false", "unknown")
