"""Each policy that serves where attention and experts are apart, once.

Whole runs, through the gateway as experiments do; nothing of them is left.
"""

from typing import Any

import pytest

from resilient_moe.faults import Fault
from resilient_moe.report.history import of_kind
from tests.runtime.harness import Lab
from tests.runtime.process.harness import (
  Runs,
  actions,
  kinds,
  moved,
)
from tests.runtime.process.split import (
  FEW,
  check,
  failures,
  lost,
  split_case,
)

pytestmark = pytest.mark.slow

# Policy, its arguments, who is lost; actions it must have taken.
PLANS: list[tuple[str, dict[str, Any], tuple[int, ...], set[str]]] = [
  ("mesh_shrink", {}, (2,), {"CopyExperts", "RemapExperts"}),
  ("replica_promotion", {}, (3,), {"Fence"}),
  ("revive_moe", {}, (2,), {"Fence"}),
  ("role_switch", {}, (3,), {"SwitchRole", "CopyExperts"}),
  ("kv_restore", {}, (0,), {"RestoreKV"}),
  ("kv_restore_host", {}, (1, 2), {"RestoreKV"}),
  ("retry", {}, (1,), {"FailRequests"}),
]


@pytest.mark.parametrize(
  ("policy", "kwargs", "ranks", "acts"), PLANS, ids=[p for p, *_ in PLANS]
)
def test_each_policy_loses_no_request(
  lab: Lab, runs: Runs, policy: str, kwargs: dict, ranks: tuple[int, ...],
  acts: set[str],
) -> None:  # fmt: skip
  case = split_case(
    lab, policy, lost(*ranks), policy_kwargs=kwargs, requests=FEW
  )
  events = runs(case)
  check(lab, events, policy, FEW)
  assert sorted(r for _, each in failures(events) for r in each) == [*ranks]
  assert acts <= {e["name"] for e in of_kind(events, "action")}
  if "RestoreKV" in acts:
    assert "restore" in moved(events)
  assert runs.marked.left() == []


def test_a_cached_restart_starts_everybody_again(lab: Lab, runs: Runs) -> None:
  events = runs(split_case(lab, "restart_cached", lost(0), requests=FEW))
  check(lab, events, "restart_cached", FEW)
  assert failures(events) == [("RanksLost", [0])]
  assert actions(events, "RestartInstance") == ["stored"]
  assert runs.marked.left() == []


def test_the_orchestrators_end_is_the_end_of_all_and_they_go_on(
  lab: Lab, runs: Runs
) -> None:
  """What had been answered stands; a later loss finds everybody whole."""
  faults = Fault("supervisor_lost", (), at_step=12), lost(3, at_step=24)
  case = split_case(lab, "tarragon", *faults, requests=FEW)
  events = runs(case)
  check(lab, events, "tarragon", FEW)
  assert kinds(events, "fault", "kind") == ["supervisor_lost", "rank_lost"]
  assert runs.marked.left() == []
  assert {p.name for p in runs.folder.iterdir()} == {
    "engine.log", "history.jsonl", "outputs.jsonl"
  }  # fmt: skip
