"""Every action, done by workers that attend or hold experts, is as defined.

As `tests/runtime/split/test_conformance.py`, over real processes.
"""

import pathlib
import time
from collections.abc import Iterator

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.recovery.checks import servable
from resilient_moe.report import History
from resilient_moe.report.history import of_kind
from resilient_moe.runtime import assemble
from resilient_moe.runtime.process import supervise
from resilient_moe.runtime.process.split_backend import SplitProcess
from resilient_moe.runtime.weights import WeightTiers
from resilient_moe.serving.scheduler import StepBatch
from tests.runtime.harness import Lab, make_requests, on
from tests.runtime.process.harness import (
  LIMIT_S,
  Marked,
  at_most,
  seed_store,
)
from tests.runtime.process.split import split_case
from tests.runtime.process.test_conformance import Engine
from tests.runtime.watch import Watch

pytestmark = pytest.mark.slow

ATTEND, HOLD = rm.Role.ATTENTION, rm.Role.EXPERT
KWARGS = {"checkpoint": "host", "replicas": 0}


class Stepping(SplitProcess):
  """One step at a time, waited for."""

  def step(self, batch: StepBatch) -> np.ndarray:
    self.begin(batch)
    while not (ended := self.finished(0.01)):
      pass
    ((_, tokens),) = ended
    assert tokens is not None
    return tokens


class Apart(Engine):
  """Three attention workers (0 to 2) and two that hold experts (3, 4)."""

  def bring_back(self, rank: int) -> None:
    self.do(rm.LaunchRank(rank))
    action = rm.Rejoin(rank)
    assert not self.backend.ready_for(action), "nobody waits for a start"
    self.driver.step(2)
    while not self.backend.ready_for(action):
      assert self.backend.poll(repairing=True) == ()
      time.sleep(0.005)
    self.settle()
    self.do(action)


@pytest.fixture
def plan(
  lab: Lab, tmp_path: pathlib.Path, marked: Marked,
  monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Apart]:  # fmt: skip
  from resilient_moe.runtime.process import split_supervise

  monkeypatch.setattr(split_supervise, "SplitProcess", Stepping)
  case = split_case(
    lab, "kv_restore", ranks=5, attention=3, policy_kwargs=KWARGS
  )
  plans = assemble.plan_instance(case, assemble.Fresh())
  seed_store(lab, case, tmp_path / "executables")
  history = History()
  with at_most(LIMIT_S, marked):
    backend = supervise.assemble(
      case, plans, assemble.Fresh(), tmp_path, history
    )
    try:
      yield Apart(backend, history, WeightTiers(lab.checkpoint))
    finally:
      backend.close()
  (sums,) = of_kind(history, "checkpoint")
  assert sums["bytes_total"] > 0
  assert marked.left() == []


def test_every_action_is_as_it_is_defined(
  lab: Lab, plan: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
  watch = Watch(monkeypatch)
  driver = plan.driver
  driver.accept(make_requests(n=6))
  driver.step(6)
  plan.settle()
  plan.copy(rm.Tier.PEER, 0, 4)
  plan.copy(rm.Tier.HOST, 1, 4)
  plan.copy(rm.Tier.DISK, 6, 3)
  plan.do(rm.MaskExperts((5,)))
  plan.serve_all()
  driver.step(2)
  plan.settle()
  attention_worker_holds_experts(plan)
  expert_worker_is_replaced(plan)
  ended = attention_worker_is_replaced(plan)
  plan.do(rm.Verify())
  assert watch.wrong == []
  assert set(watch.seen) == {a.__name__ for a in rm.ACTIONS} - {
    "RestartInstance"
  }
  plan.finish(lab, ended)


def attention_worker_holds_experts(plan: Apart) -> None:
  """Its requests leave first, then its KV; and it comes back to attend."""
  driver = plan.driver
  restored, computed = on(driver.state, 2)
  plan.do(rm.SwitchRole(2, HOLD))
  plan.do(rm.RestoreKV((restored,), (0,), rm.Tier.PEER))
  assert driver.state.sequences[restored].computed > 4
  plan.do(rm.RecomputePrefix((computed,), (1,)))
  plan.copy(rm.Tier.HOST, 3, 2)
  plan.serve_all()
  driver.step(2)
  plan.settle()
  plan.do(rm.SwitchRole(2, ATTEND))
  plan.serve_all()
  assert servable(plan.view) is None
  driver.step(2)
  plan.settle()


def expert_worker_is_replaced(plan: Apart) -> None:
  plan.do(rm.RebuildMesh((0, 1, 2, 3)))
  plan.do(rm.FetchExecutable(frozenset({4})))
  plan.do(rm.Fence((4,)))
  plan.cover()
  plan.driver.step(2)
  plan.settle()
  plan.bring_back(4)
  assert (plan.view.slots[4] < 0).all()
  plan.copy(rm.Tier.PEER, 0, 4)
  plan.serve_all()
  plan.driver.step(2)
  plan.settle()


def attention_worker_is_replaced(plan: Apart) -> str:
  """The request that was failed."""
  driver = plan.driver
  restored, queued, ended = (on(driver.state, 0) + on(driver.state, 1))[:3]
  plan.do(rm.RestoreKV((restored,), (2,), rm.Tier.HOST))
  plan.do(rm.Requeue((queued,)), rm.FailRequests((ended,)))
  rest = on(driver.state, 1)
  plan.do(rm.RebuildMesh((0, 2, 3, 4)), rm.Fence((1,)))
  if rest:
    plan.do(rm.Requeue(tuple(rest)))
  driver.step(1)
  plan.settle()
  plan.bring_back(1)
  driver.step(1)
  plan.settle()
  return ended
