"""Every action, executed on real arrays, does what `advance` says.

The contract tests hold the same of every action in their runs; here are all
of `ACTIONS`, also those that no policy of the suite uses.
"""

import dataclasses

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.runtime.execute import EXECUTE
from resilient_moe.serving import recover
from resilient_moe.serving.state import SchedulerState
from tests.runtime.drive import Driver
from tests.runtime.harness import Host, Lab, make_case, make_requests
from tests.runtime.watch import Watch, differences, world

BY_THE_LOOP = {rm.Requeue, rm.FailRequests, rm.RestartInstance}


def nobody(event: str, t: float | None = None, **fields: object) -> None:
  """A record that keeps nothing."""


def on(state: SchedulerState, rank: int) -> list[str]:
  return [n for n, s in state.sequences.items() if s.rank == rank]


class Plan:
  """Carries actions out one by one, chosen by what is there."""

  def __init__(self, driver: Driver) -> None:
    self.driver = driver

  @property
  def view(self) -> rm.ClusterView:
    return world(self.driver.backend, self.driver.state)

  def do(self, *actions: rm.Action) -> list[str]:
    outcomes = []
    for action in actions:
      self.driver.state, outcome = recover.carry_out(
        action, self.driver.state, self.driver.backend, nobody
      )
      outcomes.append(outcome.detail)
    return outcomes

  def copy(self, tier: rm.Tier, expert: int, rank: int) -> None:
    slot = int((self.view.slots[rank] < 0).argmax())
    source = int((self.view.slots == expert).any(axis=1).argmax())
    self.do(rm.CopyExperts((rm.Move(expert, rank, slot, source),), tier))

  def serve_all(self) -> None:
    """Everything that is held serves, up to the table's width."""
    self.do(rm.RemapExperts(rm.retable(self.view)))


def test_every_action_is_as_it_is_defined(
  lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
  watch = Watch(monkeypatch)
  case = make_case(
    lab, "kv_restore", policy_kwargs={"checkpoint": "host", "replicas": 0}
  )
  _, backend = Host(lab, case).start()
  driver = Driver(backend)
  driver.accept(make_requests(n=8))
  driver.step(10)
  plan = Plan(driver)
  for tier, expert, rank in (
    (rm.Tier.PEER, 0, 2), (rm.Tier.HOST, 1, 3), (rm.Tier.DISK, 2, 0),
  ):  # fmt: skip
    plan.copy(tier, expert, rank)
  plan.do(rm.MaskExperts((5, 6)))
  plan.serve_all()
  driver.step(2)
  plan.do(rm.SwitchRole(3, rm.Role.EXPERT))
  plan.do(rm.SwitchRole(3, rm.Role.COLLOCATED), rm.RebuildMesh((0, 1, 2)))
  assert plan.do(rm.FetchExecutable(frozenset({3}))) == ["stored"]
  assert plan.do(rm.FetchExecutable(frozenset({0}))) == ["stored"]
  assert plan.do(rm.FetchExecutable(frozenset({3}))) == ["warm"]
  away = on(driver.state, 3)
  assert len(away) == 2
  plan.do(rm.RestoreKV(tuple(away[:1]), (0,), rm.Tier.PEER))
  assert driver.state.sequences[away[0]].computed > 10
  plan.do(rm.RecomputePrefix(tuple(away[1:]), (1,)))
  moves = rm.assign(plan.view, rm.lost_experts(plan.view))
  assert not isinstance(moves, str)
  plan.do(*rm.copies_from(plan.view, moves))
  plan.serve_all()
  plan.do(rm.Fence((3,)))
  driver.step(2)
  plan.do(rm.LaunchRank(3), rm.Rejoin(3), rm.Verify())
  queued, ended = on(driver.state, 0)[0], on(driver.state, 2)[0]
  plan.do(rm.RestoreKV((on(driver.state, 1)[0],), (3,), rm.Tier.HOST))
  plan.do(rm.Requeue((queued,)), rm.FailRequests((ended,)))
  assert watch.wrong == []
  done = {a.__name__ for a in rm.ACTIONS} - {"RestartInstance"}
  assert set(watch.seen) == done
  while driver.step():
    pass
  backend.close()
  for name, tokens in driver.tokens.items():
    assert name == ended or tokens == expected(lab, name), name


def expected(lab: Lab, name: str) -> list[int]:
  return [
    token
    for event in lab.twin if event["event"] == "step"
    for request, _, token in event["emitted"] if request == name
  ]  # fmt: skip


@pytest.mark.parametrize("kind", rm.ACTIONS, ids=lambda a: a.__name__)
def test_every_action_has_its_executor(kind: type[rm.Action]) -> None:
  assert callable(EXECUTE[kind])
  if kind in BY_THE_LOOP:
    with pytest.raises(ValueError, match=f"{kind.__name__} is carried out by"):
      EXECUTE[kind](None, object.__new__(kind), ())


def test_a_restart_ends_the_engine(lab: Lab) -> None:
  _, backend = Host(lab, make_case(lab, "restart")).start()
  driver = Driver(backend)
  driver.accept(make_requests(n=2))
  action = rm.RestartInstance((0, 1, 2), cache=False)
  with pytest.raises(recover.EngineRestart) as caught:
    Plan(driver).do(action)
  assert caught.value.action == action
  assert set(caught.value.state.sequences) == {"r0", "r1"}
  backend.close()


def test_a_canary_that_says_something_else_is_an_error(lab: Lab) -> None:
  _, backend = Host(lab, make_case(lab, "mesh_shrink")).start()
  plan = Plan(Driver(backend))
  assert plan.do(rm.Verify()) == ["canary equal"]
  wrong = {k: 30 * w for k, w in backend.store.read_slot(0, 0).items()}
  for rank, held in enumerate(backend.view().slots):
    for slot in np.flatnonzero(held >= 0).tolist():
      backend.store.write_slot(rank, slot, wrong)
  with pytest.raises(RuntimeError, match="canary 'canary': token"):
    plan.do(rm.Verify())
  backend.close()


def test_the_comparison_sees_every_field() -> None:
  view = rm.bare_view(4, 8)
  other = dataclasses.replace(view, epoch=1, mesh=view.mesh[::-1])
  assert differences(view, view) == []
  found = differences(view, other)
  assert [line.split(":")[0] for line in found] == ["epoch", "mesh"]
