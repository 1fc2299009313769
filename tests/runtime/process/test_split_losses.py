"""Attention and expert workers are killed; the others hardly notice.

One engine of 2 attention workers (0, 1), 4 expert workers (2 to 5) and 2
stores serves everything here; whoever is lost is replaced behind traffic.
"""

import pathlib
from collections.abc import Iterator

import pytest

from resilient_moe.faults import Fault
from resilient_moe.report.history import of_kind
from tests.runtime.harness import Lab, make_requests
from tests.runtime.process.harness import actions, kinds, marking, moved
from tests.runtime.process.split import (
  Engine,
  between,
  engine,
  failures,
  lost,
  steps_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(
  lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
  with marking() as marked:
    folder = tmp_path_factory.mktemp("split")
    with engine(
      lab, folder, marked, "tarragon", ranks=6, exchange={"stores": 2}
    ) as made:
      yield made


def test_without_faults_nobody_notices_anything(served: Engine) -> None:
  events = served()
  assert of_kind(events, "healed") == of_kind(events, "step_failed") == []
  assert of_kind(events, "warning") == []


def test_an_expert_workers_end_pauses_nobody(served: Engine) -> None:
  events = served(lost(3))
  assert failures(events) == [("RanksLost", [3])]
  assert of_kind(events, "step_failed") == []
  assert kinds(events, "resumed", "paused") == [[]]
  assert {e["rank"] for e in of_kind(events, "healed")} == {3}
  assert of_kind(events, "requests_moved") == []
  assert actions(events, "Rejoin")


def test_an_attention_workers_end_pauses_its_own_requests(
  served: Engine,
) -> None:
  """They go on elsewhere, with the KV from the store."""
  events = served(lost(0))
  assert failures(events) == [("RanksLost", [0])]
  (fault,) = of_kind(events, "fault")
  assert fault["affected"]
  (paused,) = kinds(events, "resumed", "paused")
  assert set(paused) <= set(fault["affected"])
  assert moved(events).keys() <= {"restore", "requeue"}
  assert of_kind(events, "healed") == []
  assert {e["domain"][0] for e in served_while_down(events)} == {1}


def served_while_down(events: list) -> list:
  """Steps from the failure to the repair."""
  return steps_in(between(events, "failure", "redundancy"))


def steps_in(events: list) -> list:
  return [e for e in of_kind(events, "step") if e["emitted"]]


@pytest.mark.parametrize(
  ("rank", "when"),
  [
    (1, {"inside": "attention"}),
    (0, {"inside": "exchange"}),
    (1, {"phase": "prefill"}),
    (2, {"inside": "experts"}),
    (4, {"inside": "exchange"}),
    (5, {"phase": "prefill"}),
  ],
  ids=str,
)
def test_wherever_it_is_lost_no_token_changes(
  served: Engine, rank: int, when: dict
) -> None:
  events = served(lost(rank, **when))
  assert failures(events) == [("RanksLost", [rank])]
  assert kinds(events, "fault", "ranks") == [[rank]]
  failed = [
    e for e in of_kind(events, "step_failed") if "inside" not in when or rank > 1
  ]
  assert rank < 2 or failed == []
  if rank >= 2:
    assert of_kind(events, "healed")


def test_workers_of_both_roles_at_once(served: Engine) -> None:
  events = served(lost(3, 1))
  assert sorted(r for _, ranks in failures(events) for r in ranks) == [1, 3]
  assert steps_of(between(events, "failure", "redundancy"), 0)


def test_two_expert_workers_at_once(served: Engine) -> None:
  """Experts whose shadow died too are read again."""
  events = served(lost(2, 4))
  assert sorted(r for _, ranks in failures(events) for r in ranks) == [2, 4]


def test_an_attention_worker_during_the_recovery_of_an_expert_worker(
  served: Engine,
) -> None:
  second = lost(0, at_step=None, during_recovery=1)
  events = served(lost(5), second)
  assert sorted(r for _, ranks in failures(events) for r in ranks) == [0, 5]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_replacement_is_lost_as_its_predecessor_was(
  served: Engine, rank: int
) -> None:
  again = lost(rank, at_step=20, after_ready=True)
  events = served(lost(rank), again, requests=make_requests(24))
  assert failures(events) == [("RanksLost", [rank])] * 2
  assert len(actions(events, "Rejoin")) == 2


@pytest.mark.parametrize("rank", [1, 4])
def test_who_leaves_in_time_takes_nothing_along(
  served: Engine, rank: int
) -> None:
  leaving = Fault("rank_leaving", (rank,), at_step=12, deadline_s=5.0)
  events = served(leaving)
  assert failures(events) == [("RanksLeaving", [rank])]
  assert sum(moved(events).values()) == 0
  assert of_kind(events, "step_failed") == []


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("resume_s", [None, 0.8])
def test_who_is_stuck_is_fenced_and_replaced(
  served: Engine, rank: int, resume_s: float | None
) -> None:
  stuck = Fault("rank_stuck", (rank,), at_step=12, resume_s=resume_s)
  old = served.pid(rank)
  events = served(stuck)
  assert failures(events) == [("RanksLost", [rank])]
  texts = kinds(events, "warning", "text")
  assert f"rank {rank} is alive and does not answer: fenced" in texts
  assert served.pid(rank) != old
  served.until(lambda: not pathlib.Path(f"/proc/{old}").exists())


@pytest.mark.parametrize("kind", ["link_cut", "link_slow"])
def test_a_bad_link_hurts_only_who_uses_it(served: Engine, kind: str) -> None:
  delay_s = 0.02 if kind == "link_slow" else None
  bad = Fault(kind, (0, 3), at_step=12, delay_s=delay_s, resume_s=1.0)
  events = served(bad)
  assert of_kind(events, "step_failed") == []


def test_a_straggler_is_found(served: Engine) -> None:
  slow = Fault("straggler", (0,), at_step=12, slowdown=4.0)
  served(slow)


def test_a_store_then_an_attention_worker(served: Engine) -> None:
  store = Fault("store_lost", (), at_step=12)
  events = served(store, lost(0, at_step=20))
  texts = " ".join(kinds(events, "warning", "text"))
  assert "KV store 0 is gone: requests of ranks [0] stream to another" in texts


def test_all_stores_then_an_attention_worker(served: Engine) -> None:
  store = Fault("store_lost", (), at_step=12)
  events = served(store, lost(0, at_step=20))
  texts = " ".join(kinds(events, "warning", "text"))
  assert "are prefilled when they move" in texts
  assert "restore" not in moved(events)


def test_nothing_was_compiled(served: Engine) -> None:
  print(served.call("compiled", *range(6)), [served.held(r) for r in range(6)])
