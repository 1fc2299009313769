"""Every action, with attention and experts apart, does what `advance` says."""

from collections.abc import Iterator

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.recovery.checks import servable
from tests.runtime.drive import Driver
from tests.runtime.harness import Host, Lab, Plan, make_requests, on
from tests.runtime.split.apart import apart
from tests.runtime.watch import Watch

ATTENTION = 3
ATTEND, HOLD = rm.Role.ATTENTION, rm.Role.EXPERT


@pytest.fixture
def plan(lab: Lab) -> Iterator[Plan]:
  """Three attention ranks, and three expert ranks with free slots."""
  case = apart(
    lab, "kv_restore", attention=ATTENTION,
    policy_kwargs={"checkpoint": "host", "replicas": 0},
  )  # fmt: skip
  _, backend = Host(lab, case).start()
  plan = Plan(Driver(backend))
  plan.driver.accept(make_requests(n=6))
  plan.driver.step(6)
  yield plan
  backend.close()


def test_every_action_is_as_it_is_defined(
  lab: Lab, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
  watch = Watch(monkeypatch)
  driver = plan.driver
  plan.copy(rm.Tier.PEER, 0, 5)
  plan.copy(rm.Tier.HOST, 1, 5)
  plan.copy(rm.Tier.DISK, 2, 3)
  plan.do(rm.MaskExperts((5, 6)))
  plan.serve_all()
  driver.step(2)
  _attention_rank_holds_experts(plan)
  _expert_rank_is_replaced(plan)
  ended = _attention_rank_is_replaced(plan)
  plan.do(rm.Verify())
  assert watch.wrong == []
  assert set(watch.seen) == {a.__name__ for a in rm.ACTIONS} - {
    "RestartInstance"
  }
  plan.finish(lab, ended)


def _attention_rank_holds_experts(plan: Plan) -> None:
  """Its requests leave first, then its KV; and it comes back to attend."""
  driver, store = plan.driver, plan.driver.backend.store
  away = on(driver.state, 2)
  plan.do(rm.SwitchRole(2, HOLD))
  assert store.attends(2), "its requests are still to be handed over"
  plan.copy(rm.Tier.HOST, 3, 2)
  plan.do(rm.RestoreKV((away[0],), (0,), rm.Tier.PEER))
  assert driver.state.sequences[away[0]].computed > 4
  plan.do(rm.RecomputePrefix((away[1],), (1,)))
  assert len(away) == 2
  assert not store.attends(2)
  plan.serve_all()
  driver.step(2)
  plan.do(rm.SwitchRole(2, ATTEND))
  assert not store.computes(2)
  plan.serve_all()
  assert servable(plan.view) is None
  driver.step(2)


def _expert_rank_is_replaced(plan: Plan) -> None:
  plan.do(rm.RebuildMesh((0, 1, 2, 3, 4)))
  plan.do(rm.FetchExecutable(frozenset({5})))
  plan.do(rm.Fence((5,)))
  plan.cover()
  plan.driver.step(2)
  plan.bring_back(5)
  assert (plan.view.slots[5] < 0).all()
  plan.copy(rm.Tier.PEER, 0, 5)
  plan.serve_all()
  plan.driver.step(2)


def _attention_rank_is_replaced(plan: Plan) -> str:
  """The request that was failed."""
  driver = plan.driver
  restored, queued, ended = (on(driver.state, 0) + on(driver.state, 1))[:3]
  plan.do(rm.RestoreKV((restored,), (2,), rm.Tier.HOST))
  plan.do(rm.Requeue((queued,)), rm.FailRequests((ended,)))
  rest = on(driver.state, 1)
  plan.do(rm.RebuildMesh((0, 2, 3, 4, 5)), rm.Fence((1,)))
  if rest:
    plan.do(rm.Requeue(tuple(rest)))
  driver.step(1)
  plan.bring_back(1)
  driver.step(1)
  return ended


@pytest.mark.parametrize("role", [HOLD, ATTEND])
def test_who_has_a_role_and_is_given_it_keeps_what_it_holds(
  lab: Lab, plan: Plan, role: rm.Role, monkeypatch: pytest.MonkeyPatch
) -> None:
  watch = Watch(monkeypatch)
  rank = {HOLD: 4, ATTEND: 1}[role]
  plan.do(rm.SwitchRole(rank, role))
  assert watch.wrong == []
  plan.finish(lab, ended="")


def test_who_changes_its_mind_has_its_requests_still(
  lab: Lab, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A plan may be abandoned right behind the switch."""
  watch = Watch(monkeypatch)
  assert on(plan.driver.state, 1)
  plan.do(rm.SwitchRole(1, HOLD), rm.SwitchRole(1, ATTEND))
  assert watch.wrong == []
  plan.finish(lab, ended="")


def test_a_canary_that_says_something_else_is_an_error(plan: Plan) -> None:
  store = plan.driver.backend.store
  for rank, held in enumerate(plan.view.slots):
    for slot in np.flatnonzero(held >= 0).tolist():
      wrong = {k: 30 * w for k, w in store.read_slot(rank, slot).items()}
      store.write_slot(rank, slot, int(held[slot]), wrong)
  with pytest.raises(RuntimeError, match="canary 'canary': token"):
    plan.do(rm.Verify())
