"""Every action, executed on real arrays, does what `advance` says.

The contract tests hold the same of every action in their runs; here are all
of `ACTIONS`, also those that no policy of the suite uses.
"""

import dataclasses

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.runtime.execute import EXECUTE
from resilient_moe.serving.carry import EngineRestart
from tests.runtime.drive import Driver
from tests.runtime.harness import Host, Lab, Plan, make_case, make_requests
from tests.runtime.watch import Watch, differences

BY_THE_LOOP = {rm.Requeue, rm.FailRequests, rm.RestartInstance}
# A restart is the gateway's, and roles are switched where they are apart.
NOT_HERE = {"RestartInstance", "SwitchRole"}


def test_every_action_is_as_it_is_defined(
  lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
  watch = Watch(monkeypatch)
  case = make_case(
    lab, "kv_restore", policy_kwargs={"checkpoint": "host", "replicas": 0}
  )
  _, backend = Host(lab, case).start()
  plan = Plan(Driver(backend))
  ended = plan.every_action()
  assert plan.do(rm.FetchExecutable(frozenset({0}))) == ["stored"]
  assert watch.wrong == []
  assert set(watch.seen) == {a.__name__ for a in rm.ACTIONS} - NOT_HERE
  plan.finish(lab, ended)
  backend.close()


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
  with pytest.raises(EngineRestart) as caught:
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
