"""`serve` with several domains: what breaks in one doesn't stop the others."""

from typing import Any

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.report import History
from resilient_moe.report.history import of_kind
from resilient_moe.serving.recover import Recovery
from resilient_moe.serving.request import Request
from resilient_moe.serving.state import Current, SchedulerState
from tests.serving import domains
from tests.serving.runs import check, some_requests

AWS, EWS = range(3), range(3, 6)
POLICIES: dict[str, dict[str, Any]] = {
  "mesh_shrink": {},
  "kv_restore": {"checkpoint": "peer"},
  "kv_restore-host": {"checkpoint": "host"},
  "replica_promotion": {},
  "tarragon": {},
  "role_switch": {"replace": True},
  "retry": {},
}


def load(name: str, **kwargs: Any) -> rm.RecoveryPolicy:
  return rm.load(name.split("-")[0], **POLICIES[name], **kwargs)


def long_requests(n: int = 9) -> list[Request]:
  """All there from the start, and for a while."""
  return [Request(f"r{i}", (1 + i,) * 4, 20, seed=i, arrival_step=0)
          for i in range(n)]  # fmt: skip


def test_without_faults_each_domain_steps_by_itself(rng) -> None:
  requests = some_requests(rng)
  history, backend = domains.run(rm.load("none"), requests, rng)
  check(history, requests)
  domains.check_steps(history, backend)
  assert {b.mesh for b in backend.begun} == {(0,), (1,), (2,)}
  assert not of_kind(history, "step_failed")


@pytest.mark.parametrize("quick", [0.2, 1.0])
@pytest.mark.parametrize("name", POLICIES)
def test_a_loss_at_any_step_of_any_rank_changes_no_token(
  name: str, quick: float, rng
) -> None:
  requests = some_requests(rng)
  for step in range(0, 40, 5):
    for rank in (int(rng.choice(AWS)), int(rng.choice(EWS))):
      history, backend = domains.run(
        load(name), requests, rng, quick=quick, lose_at={step: (rank,)}
      )
      check(history, requests, fails=name == "retry")
      domains.check_steps(history, backend)


@pytest.mark.parametrize("name", ["kv_restore", "tarragon", "mesh_shrink"])
def test_losses_one_after_another_and_during_recovery(name: str, rng) -> None:
  requests = some_requests(rng)
  for _ in range(12):
    one, other = int(rng.choice(AWS)), int(rng.choice(EWS))
    first, second = rng.permutation([one, other]).tolist()
    step, later = int(rng.integers(0, 30)), int(rng.integers(1, 6))
    faults: dict[str, Any] = {"lose_at": {step: (first,)}}
    if rng.random() < 0.5:
      faults["lose_in_recovery"] = {int(rng.integers(1, 4)): (second,)}
    else:
      faults["lose_at"][step + later] = (second,)
    history, backend = domains.run(load(name), requests, rng, **faults)
    check(history, requests)
    domains.check_steps(history, backend)


@pytest.mark.parametrize("name", ["mesh_shrink", "kv_restore"])
def test_a_rank_that_leaves_hands_its_requests_over_between_steps(
  name: str, rng
) -> None:
  requests = some_requests(rng)
  for rank in (1, 4):
    history, backend = domains.run(
      load(name), requests, rng, leave_at={9: (rank,)}
    )
    check(history, requests)
    domains.check_steps(history, backend)
    assert rank not in backend.view().mesh
    assert not of_kind(history, "step_failed")


def test_requests_elsewhere_get_tokens_during_the_recovery(rng) -> None:
  requests = long_requests()
  history, backend = domains.run(
    load("mesh_shrink"), requests, rng, quick=1.0, lose_at={30: (1,)}
  )
  check(history, requests)
  events = list(history)
  kinds = [e["event"] for e in events]
  begin, end = kinds.index("failure"), kinds.index("resumed")
  steps = of_kind(events[begin:end], "step")
  assert {tuple(e["domain"]) for e in steps} == {(0,), (2,)}
  failed = [b.mesh for b, ok in backend.ended if not ok]
  assert failed == [(1,)]


def test_a_step_that_fails_last_does_not_take_back_a_number(rng) -> None:
  """One with a higher number may have ended before it, and counts."""
  twice = 0
  for _ in range(20):
    history, backend = domains.run(
      load("kv_restore-host"), long_requests(), rng, quick=0.3,
      lose_at={int(rng.integers(8, 30)): (int(rng.choice(AWS)),)},
    )  # fmt: skip
    domains.check_steps(history, backend)
    (failed, *_) = of_kind(history, "step_failed")
    events = list(history)
    before = of_kind(events[: events.index(failed)], "step")
    twice += any(e["step"] > failed["step"] for e in before)
  assert twice, "else this has tested nothing"


def test_who_ended_in_a_domain_that_is_no_more_is_told_elsewhere(rng) -> None:
  """A request ends in the last step of a rank before it is lost."""
  told = 0
  for _ in range(20):
    requests = [
      Request(f"r{i}", (1 + i,) * 3, 4 + 6 * (i % 3 != 1), seed=i,
              arrival_step=0)
      for i in range(9)
    ]  # fmt: skip
    history, backend = domains.run(
      load("mesh_shrink"), requests, rng, quick=1.0,
      lose_at={int(rng.integers(10, 24)): (1,)},
    )  # fmt: skip
    check(history, requests)
    domains.check_steps(history, backend)
    home = {e["request_id"]: e["rank"] for e in of_kind(history, "admitted")}
    told += sum(
      home[n] == 1 and b.mesh != (1,)
      for b, ok in backend.ended if ok for n in b.retired
    )  # fmt: skip
  assert told


@pytest.mark.parametrize(
  "failure", [rm.LinkLost(0, 4), rm.Straggler(2, 3.0)], ids=["link", "slow"]
)
def test_what_is_tolerated_leaves_the_plan_at_hand_as_it_is(
  failure: rm.Failure, rng: np.random.Generator,
  monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  """Nobody else would bring the lost rank's requests back."""
  real = domains.Domains.poll

  for after in range(1, 4):

    def poll(self, done=None, repairing=False, at=after) -> tuple:
      found = real(self, done, repairing)
      if done == at and not of_kind(self._history, "infeasible"):
        return (*found, failure)
      return found

    monkeypatch.setattr(domains.Domains, "poll", poll)
    requests = long_requests()
    history, _ = domains.run(
      load("replica_promotion"), requests, rng, lose_at={15: (1,)}
    )
    check(history, requests)
    _one_plan(history)


def test_who_is_moved_next_begins_no_step() -> None:
  """Else the action behind traffic would wait for ever."""
  policy = rm.load("none")
  view = domains.bare(2, 2)
  backend = domains.Domains(
    view, policy.prepare(view), History(), np.random.default_rng(0)
  )
  recovery = Recovery(
    policy, backend, History().write, Current(SchedulerState())
  )
  recovery.repair.append(rm.Requeue(("a", "b")))
  assert recovery.held() == {"a", "b"}
  recovery.repair.append(rm.Requeue(("c",)))
  recovery.at_hand = rm.Requeue(("d",))
  assert recovery.held() == {"d"}


def _one_plan(history: History) -> None:
  assert len(of_kind(history, "infeasible")) == 1
  assert len(of_kind(history, "plan")) == len(of_kind(history, "resumed")) == 1
