"""KV of an attention rank's requests lies with the next attention rank."""

from collections.abc import Iterator

import pytest

from resilient_moe import recovery as rm
from tests.runtime.drive import Driver
from tests.runtime.harness import Host, Lab, Plan, make_requests, on
from tests.runtime.split.apart import apart, exact, lost

PEER = {"checkpoint": "peer"}


@pytest.fixture
def driver(lab: Lab) -> Iterator[Driver]:
  case = apart(lab, "kv_restore", attention=3, policy_kwargs=PEER)
  _, backend = Host(lab, case).start()
  driver = Driver(backend)
  driver.accept(make_requests(n=6))
  driver.step(5)
  yield driver
  backend.close()


def holders(driver: Driver, rank: int) -> set[int]:
  """Who holds the checkpoints of a rank's requests."""
  saved = driver.backend.checkpoints()
  return {saved[name][1] for name in on(driver.state, rank)}


def test_the_next_attention_rank_holds_it(driver: Driver) -> None:
  assert [holders(driver, rank) for rank in range(3)] == [{1}, {2}, {0}]
  saved = driver.backend.checkpoints()
  for name, s in driver.state.sequences.items():
    assert saved[name][0] == s.computed > 0


def test_the_host_holds_it_for_the_only_one(lab: Lab) -> None:
  case = apart(lab, "kv_restore", ranks=4, attention=1, policy_kwargs=PEER)
  _, backend = Host(lab, case).start()
  driver = Driver(backend)
  driver.accept(make_requests(n=2))
  driver.step(3)
  assert holders(driver, 0) == {-1}
  backend.close()


def test_nobody_is_held_by_the_dead_while_others_step_on(
  driver: Driver,
) -> None:
  """The dead rank stays in the mesh until a plan takes it out."""
  backend = driver.backend
  backend._lose((1,))
  for _ in range(3):
    assert driver._step((0,))
    assert driver._step((2,))
    saved = backend.checkpoints()
    assert 1 not in {holder for _, holder in saved.values()}
    assert rm.plannable(rm.lose(Plan(driver).view, (1,))) is None
  backend.take_pending()
  for _ in range(6):  # stored anew, one a poll
    backend.poll()
  assert holders(driver, 0) == {2}
  assert holders(driver, 2) == {0}


def test_a_replacement_is_in_the_ring_again(driver: Driver) -> None:
  plan, backend = Plan(driver), driver.backend
  plan.do(rm.RebuildMesh((0, 2, 3, 4, 5)))
  moved = tuple(on(driver.state, 1))
  plan.do(rm.Fence((1,)), rm.Requeue(moved))
  assert backend.checkpointer.ring == (0, 2)
  plan.bring_back(1)
  assert backend.checkpointer.ring == (0, 1, 2)
  driver.step(4)
  assert {holders(driver, 1) <= {2}, holders(driver, 2) == {0}} == {True}


def test_a_rank_and_the_holder_of_its_checkpoints_are_lost(lab: Lab) -> None:
  faults = (lost(0), lost(1, at_step=30))
  case = apart(lab, "kv_restore", faults, attention=3, policy_kwargs=PEER)
  host = Host(lab, case)
  host.run()
  exact(lab, host)
