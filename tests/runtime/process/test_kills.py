"""Processes are killed and stopped while they serve; every token is the twin's.

The twin is the fault-free run of the emulated runtime: tokens are equal across
runtimes. Each run goes through the gateway, as experiments do.
"""

import os
import signal
from typing import Any

import pytest

from resilient_moe import recovery
from resilient_moe.faults import Fault, Schedule
from resilient_moe.report.history import of_kind
from tests.runtime.harness import Lab
from tests.runtime.process.harness import (
  Event,
  Runs,
  actions,
  kinds,
  moved,
  process_case,
)

pytestmark = pytest.mark.slow


def lost(*ranks: int, **when: Any) -> Fault:
  return Fault("rank_lost", ranks, **when)


def check(lab: Lab, events: list[Event], policy: str) -> None:
  """All checkers are content, and the answers those of the twin."""
  said = lab.verdict(events)
  assert said["failed"] == [], said
  if recovery.load(policy).lossless:
    assert said["checkers"]["exactness"]["value"] == "true"
  assert of_kind(events, "end")


PLACES = [  # policy, its arguments, ranks, phase of the loss
  ("mesh_shrink", {}, 3, "prefill"),
  ("replica_promotion", {}, 4, "decode"),
  ("mask_experts", {}, 3, "decode"),
  ("spare", {}, 2, "decode"),
  ("retry", {}, 3, "prefill"),
  ("restart_cached", {}, 3, "decode"),
  ("restart", {}, 3, "decode"),
]


@pytest.mark.parametrize(
  ("policy", "kwargs", "ranks", "phase"), PLACES, ids=lambda v: str(v)
)
def test_a_killed_rank_changes_no_token(
  lab: Lab, runs: Runs, policy: str, kwargs: dict, ranks: int, phase: str
) -> None:
  fault = lost(1, at_step=8, phase=phase)
  case = process_case(lab, policy, fault, policy_kwargs=kwargs, ranks=ranks)
  events = runs(case)
  check(lab, events, policy)
  (struck,) = of_kind(events, "fault")
  assert (struck["ranks"], struck["phase"]) == ([1], phase)
  assert struck["affected"]
  assert kinds(events, "failure", "ranks") == [[1]]
  mesh = kinds(events, "epoch", "mesh")[-1]
  assert 1 not in mesh
  assert len(mesh) == ranks - (policy != "spare")
  if policy not in ("restart", "restart_cached"):
    assert actions(events, "FetchExecutable") == ["warm"]


def test_a_run_that_finds_no_programs_shrinks_twice(
  lab: Lab, runs: Runs
) -> None:
  """Rank 0 in a decode step, then in a prefill step whom it had mirrored."""
  faults = (
    lost(0, at_step=6, phase="decode"),
    lost(3, at_step=14, phase="prefill"),
  )
  events = runs(process_case(lab, "kv_restore", *faults), cold=True)
  check(lab, events, "kv_restore")
  assert kinds(events, "fault", "phase") == ["decode", "prefill"]
  assert kinds(events, "epoch", "mesh")[-1] == [1, 2]
  assert actions(events, "FetchExecutable") == ["warm", "stored"]
  assert moved(events).get("recompute", 0) == 0, "checkpoints were rebased"


# Name: the losses, whether some request had to be prefilled again.
SEVERAL: dict[str, tuple[Schedule, bool]] = {
  "two_at_once": ((lost(1, 3, at_step=8),), False),
  "neighbours": ((lost(1, 2, at_step=8),), True),
  "during_recovery": ((lost(1, at_step=8), lost(3, during_recovery=1)), False),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_losses_lose_no_request(
  lab: Lab, runs: Runs, name: str
) -> None:
  faults, prefilled = SEVERAL[name]
  events = runs(process_case(lab, "kv_restore", *faults))
  check(lab, events, "kv_restore")
  struck = [r for ranks in kinds(events, "fault", "ranks") for r in ranks]
  assert len(struck) == 2
  mesh = kinds(events, "epoch", "mesh")[-1]
  assert mesh == sorted({0, 1, 2, 3} - set(struck))
  assert bool(moved(events).get("recompute", 0)) == prefilled
  if name == "during_recovery":
    # It is armed in the recovery; a short one may be over when it strikes.
    first, second = kinds(events, "fault", "phase")
    assert (first, second) in (("decode", "recovery"), ("decode", "decode"))


def test_a_rank_that_is_stuck_is_given_up_and_not_heard_again(
  lab: Lab, runs: Runs
) -> None:
  """The first stays stopped; the second goes on once it is given up."""
  stopped: list[int] = []

  def progress(event: Event) -> None:
    if event["event"] == "fault":
      stopped[:] = runs.marked.pids(f"rank={event['ranks'][0]}")
    if event["event"] == "failure" and event["ranks"] == [2]:
      os.kill(stopped[0], signal.SIGCONT)

  faults = [
    Fault("rank_stuck", (rank,), at_step=step)
    for rank, step in ((1, 8), (2, 16))
  ]
  detector = {"grace_s": 60.0}  # so that the second one surely returns
  case = process_case(lab, "kv_restore", *faults, detector=detector)
  events = runs(case, progress)
  check(lab, events, "kv_restore")
  assert kinds(events, "failure", "ranks") == [[1], [2]]
  assert kinds(events, "epoch", "mesh")[-1] == [0, 3]
  given_up = kinds(events, "failure", "epoch")[-1]
  # It may speak only after the run has ended; that it is refused when it does
  # is `test_crew.test_the_stuck_are_fenced_and_their_return_refused`.
  assert kinds(events, "stale", "rank") in ([2], [])
  assert set(kinds(events, "stale", "epoch")) <= {given_up}


def test_the_store_is_an_aid_that_may_die(lab: Lab, runs: Runs) -> None:
  """A loss before is restored from it, one after is prefilled again."""
  faults = (
    lost(1, at_step=6),
    Fault("store_lost", (), at_step=16),
    lost(3, at_step=20),
  )
  kwargs = {"checkpoint": "host"}
  events = runs(process_case(lab, "kv_restore", *faults, policy_kwargs=kwargs))
  check(lab, events, "kv_restore")
  assert kinds(events, "fault", "kind") == [
    "rank_lost", "store_lost", "rank_lost"
  ]  # fmt: skip
  first, *later = of_kind(events, "requests_moved")
  assert first["kind"] == "restore"
  assert first["bytes"] > 0
  texts = " ".join(kinds(events, "warning", "text"))
  assert "KV store 0 is gone: requests of ranks [" in texts
  assert later
  assert {e["kind"] for e in later} <= {"recompute", "requeue"}


def test_an_announced_end_costs_nothing_and_a_kill_from_outside_little(
  lab: Lab, runs: Runs
) -> None:
  """The second is no fault of the schedule: somebody's `kill -9`."""
  killed: list[int] = []

  def progress(event: Event) -> None:
    if event["event"] == "step" and event["step"] >= 20 and not killed:
      killed.extend(runs.marked.pids("rank=2"))
      for pid in killed:
        os.kill(pid, signal.SIGKILL)

  leaving = Fault("rank_leaving", (1,), at_step=8, deadline_s=5.0)
  events = runs(process_case(lab, "kv_restore", leaving), progress)
  check(lab, events, "kv_restore")
  assert len(killed) == 1
  assert kinds(events, "fault", "kind") == ["rank_leaving"]
  failures = of_kind(events, "failure")
  assert [f["kind"] for f in failures] == ["RanksLeaving", "RanksLost"]
  assert [f["ranks"] for f in failures] == [[1], [2]]
  first, *_ = of_kind(events, "requests_moved")
  assert (first["kind"], first["tokens"]) == ("restore", 0)
  assert sum(moved(events).values()) == 0
