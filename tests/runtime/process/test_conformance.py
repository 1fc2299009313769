"""Every action, done by real processes, does what `advance` says.

As `tests/runtime/test_conformance.py`, and beside it what only processes can
do: wait for one that starts, and be killed in the middle of an action. Two
engines, assembled in the test's own process, serve all of it.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.report import History
from resilient_moe.report.history import of_kind
from resilient_moe.runtime import assemble
from resilient_moe.runtime.process import supervise
from resilient_moe.runtime.process.backend import ProcessBackend
from resilient_moe.runtime.process.data import DataClient
from resilient_moe.runtime.weights import WeightTiers
from tests.runtime.drive import Driver
from tests.runtime.harness import Lab, Plan, expected, make_requests, on
from tests.runtime.process.harness import (
  LIMIT_S,
  Marked,
  at_most,
  kinds,
  process_case,
  seed_store,
)
from tests.runtime.test_conformance import NOT_HERE
from tests.runtime.watch import Watch

pytestmark = pytest.mark.slow


class Engine(Plan):
  """A backend in the test's own process, driven action by action."""

  def __init__(
    self, backend: ProcessBackend, history: History, weights: WeightTiers
  ) -> None:
    super().__init__(Driver(backend))
    self.backend, self.history = backend, history
    self._weights = weights

  def settle(self) -> None:
    """Until the checkpoints don't change behind what a test compares."""
    before = None
    while (now := self.backend.checkpoints()) != before:
      assert self.backend.poll() == ()
      time.sleep(0.05)
      before = now

  def copy(self, tier: rm.Tier, expert: int, rank: int) -> None:
    """And what the slot holds then."""
    slot = int((self.view.slots[rank] < 0).argmax())
    super().copy(tier, expert, rank)
    held = self.read_slot(rank, slot)
    wanted = jax.tree.leaves(self._weights.expert(expert))
    for a, b in zip(held, wanted, strict=True):
      np.testing.assert_array_equal(a, b, f"{tier}")

  def bring_back(self, rank: int) -> None:
    """With steps and polls in between: a process takes a while to start."""
    self.do(rm.LaunchRank(rank))
    action = rm.Rejoin(rank)
    assert not self.backend.ready_for(action), "nobody waits for a start"
    self.driver.step(3)
    while not self.backend.ready_for(action):
      assert self.backend.poll(repairing=True) == ()
      time.sleep(0.005)
    assert frozenset() in self.backend.view().ready, "made so behind traffic"
    self.settle()
    self.do(action)

  def lost(self) -> list[tuple[int, ...]]:
    """What the next poll that reports something reports."""
    give_up = time.monotonic() + 30
    while not (found := self.backend.poll(recovery_actions=0)):
      assert time.monotonic() < give_up
    return [f.ranks for f in found if isinstance(f, rm.RanksLost)]

  def read_slot(self, rank: int, slot: int) -> list[np.ndarray]:
    """Weights as another process would pull them."""
    crew = self.backend.crew
    up = crew.mate(rank).up
    assert up is not None
    client = DataClient(up.data, crew.authkey)
    try:
      return client.pull("slot", slot)
    finally:
      client.close()


@contextlib.contextmanager
def engine(
  lab: Lab, folder: pathlib.Path, marked: Marked, checkpoint: str
) -> Iterator[Engine]:
  kwargs = {"checkpoint": checkpoint}
  case = process_case(lab, "kv_restore", policy_kwargs=kwargs)
  plans = assemble.plan_instance(case, assemble.Fresh())
  seed_store(lab, case, folder / "executables")
  history = History()
  with at_most(LIMIT_S, marked):
    backend = supervise.assemble(case, plans, assemble.Fresh(), folder, history)
    try:
      yield Engine(backend, history, WeightTiers(lab.checkpoint))
    finally:
      backend.close()


def test_every_action_is_as_it_is_defined(
  lab: Lab, tmp_path: pathlib.Path, marked: Marked,
  monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  watch = Watch(monkeypatch)
  with engine(lab, tmp_path, marked, "host") as plan:
    ended = plan.every_action()
    assert watch.wrong == []
    assert set(watch.seen) == {a.__name__ for a in rm.ACTIONS} - NOT_HERE
    plan.finish(lab, ended)
  (sums,) = of_kind(plan.history, "checkpoint")
  assert sums["bytes_total"] > 0
  assert marked.left() == []


def close_up(plan: Engine, rank: int) -> None:
  """What a policy would do about a lost rank, requests prefilled again."""
  mesh = tuple(int(r) for r in plan.view.mesh if r != rank)
  names = tuple(on(plan.driver.state, rank))
  plan.do(rm.Fence((rank,)), rm.RebuildMesh(mesh))
  plan.cover()
  plan.do(rm.FetchExecutable(rm.absent(plan.view.launched, mesh)))
  plan.do(rm.Requeue(names))


def test_an_action_whose_rank_is_killed_is_abandoned(
  lab: Lab, tmp_path: pathlib.Path, marked: Marked
) -> None:
  """It leaves nothing that is trusted, and what comes after it is exact."""
  with engine(lab, tmp_path, marked, "peer") as plan:
    driver, backend = plan.driver, plan.backend
    backend.wait_ready()
    driver.accept(make_requests(n=6))
    driver.step(10)
    plan.settle()

    # Weights from a peer that is gone.
    expert = int(plan.view.slots[3][0])
    slot = int((plan.view.slots[0] < 0).argmax())
    move = rm.Move(expert, 0, slot, 3)
    plan.do(rm.CopyExperts((move,), rm.Tier.PEER))
    assert backend.view().slots[0, slot] == expert
    marked.kill("rank=3")
    assert_abandoned(plan, 3, rm.CopyExperts((move,), rm.Tier.PEER))
    assert backend.view().slots[0, slot] == -1
    close_up(plan, 3)
    driver.step(3)

    # A process that dies as it starts: nothing waits for it.
    plan.do(rm.LaunchRank(3))
    marked.kill("rank=3", "incarnation=1")
    wait_for(lambda: not backend.crew.is_up(3) and not backend.crew.alive(3))
    assert backend.ready_for(rm.Rejoin(3))
    assert_abandoned(plan, 3, rm.Rejoin(3))
    assert 3 not in backend.view().mesh
    plan.do(rm.Fence((3,)))
    driver.step(2)
    plan.settle()

    # KV from a peer that is gone, then a step of a mesh with it.
    name = on(driver.state, 2)[0]
    marked.kill("rank=2")
    action = rm.RestoreKV((name,), (0,), rm.Tier.PEER)
    assert_abandoned(plan, 2, action)
    assert driver.state.sequences[name].computed == 0
    close_up(plan, 2)
    driver.step(2)
    marked.kill("rank=1")
    assert_abandoned(plan, 1, rm.Verify())
  for name, tokens in driver.tokens.items():
    assert len(tokens) > 10, name
    assert tokens == expected(lab, name)[: len(tokens)], name
  assert kinds(plan.history, "fault", "kind") == []


def assert_abandoned(plan: Engine, rank: int, action: rm.Action) -> None:
  (outcome,) = plan.do(action)
  assert outcome.startswith("abandoned: "), outcome
  assert plan.lost() == [(rank,)]


def wait_for(there: Callable[[], bool]) -> None:
  give_up = time.monotonic() + 30
  while not there():
    assert time.monotonic() < give_up
    time.sleep(0.005)
