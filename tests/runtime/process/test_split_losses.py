"""Attention and expert workers are killed; the others hardly notice.

One engine of 2 attention workers (0, 1), 4 expert workers (2 to 5) and 2
stores serves everything here; whoever is lost is replaced behind traffic.
"""

import os
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from resilient_moe import recovery as rm
from resilient_moe.faults import Fault
from resilient_moe.report.history import of_kind
from resilient_moe.runtime.process.kv_copies import STORE_S
from resilient_moe.runtime.process.peers import Peers
from resilient_moe.runtime.process.wire import Address
from resilient_moe.serving.backend import Stepped
from tests.runtime.harness import Lab
from tests.runtime.process.harness import (
  Event,
  actions,
  kinds,
  marking,
  moved,
)
from tests.runtime.process.split import (
  FEW,
  Engine,
  between,
  engine,
  failures,
  lost,
  steps_of,
)

pytestmark = pytest.mark.slow

ATTENTION, EXPERTS = (0, 1), (2, 3, 4, 5)
# A busy machine may hold a worker up for longer than a link is given.
EXCHANGE = {"stores": 2, "link_s": 1.5}
MEND_S = 2.5
FILES, THREADS = 8, 6  # more than at first, after all these replacements


@pytest.fixture(scope="module")
def served(
  lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
  with marking() as marked:
    folder = tmp_path_factory.mktemp("split")
    with engine(
      lab, folder, marked, "tarragon", ranks=6, exchange=EXCHANGE
    ) as made:
      yield made


def lost_ranks(events: list[Event]) -> list[int]:
  return sorted(r for _, ranks in failures(events) for r in ranks)


def test_without_faults_nobody_notices_anything(served: Engine) -> None:
  events = served()
  for name in ("step_failed", "warning", "failure"):
    assert of_kind(events, name) == []
  assert steps_of(events, 0)
  assert steps_of(events, 1)


def test_an_expert_workers_end_pauses_nobody(served: Engine) -> None:
  """It is healed before the orchestrator has a plan; nobody is prepared."""
  compiled = served.call("compiled", 0, 1, 2, 4, 5)
  events = served(lost(3, inside="experts"))
  assert failures(events) == [("RanksLost", [3])]
  assert of_kind(events, "step_failed") == []
  assert kinds(events, "resumed", "paused") == [[]]
  healed = of_kind(events, "healed")
  assert 3 in {e["rank"] for e in healed}
  assert {e["by"] for e in healed} <= set(ATTENTION)
  assert of_kind(events, "requests_moved") == []
  assert len(actions(events, "Rejoin")) == 1
  assert served.call("compiled", *compiled) == compiled


def test_an_attention_workers_requests_go_on_elsewhere(
  served: Engine,
) -> None:
  """With the KV from the store; the others don't wait."""
  compiled = served.call("compiled", 1, *EXPERTS)
  events = served(lost(0), requests=FEW)
  assert failures(events) == [("RanksLost", [0])]
  (fault,) = of_kind(events, "fault")
  assert fault["affected"]
  (paused,) = kinds(events, "resumed", "paused")
  assert paused
  assert set(paused) <= set(fault["affected"])
  assert moved(events).keys() == {"restore"}
  assert sum(e["bytes"] for e in of_kind(events, "requests_moved")) > 0
  # Its own step is the only one that fails.
  assert len(of_kind(events, "step_failed")) <= 1
  waiting = between(events, "failure", "redundancy")
  assert steps_of(waiting, 1)
  assert steps_of(waiting, 0) == []
  assert served.call("compiled", *compiled) == compiled


PLACES = [
  (1, {"inside": "attention"}),
  (0, {"inside": "exchange"}),
  (1, {"phase": "prefill"}),
  (2, {"inside": "experts"}),
  (4, {"inside": "exchange"}),
  (5, {"phase": "prefill"}),
]


@pytest.mark.parametrize(("rank", "when"), PLACES, ids=str)
def test_wherever_it_is_lost_no_token_changes(
  served: Engine, rank: int, when: dict
) -> None:
  events = served(lost(rank, **when))
  assert failures(events) == [("RanksLost", [rank])]
  assert kinds(events, "fault", "ranks") == [[rank]]
  if rank in EXPERTS:
    assert of_kind(events, "step_failed") == []
  if rank in EXPERTS and "inside" in when:
    assert rank in {e["rank"] for e in of_kind(events, "healed")}


def test_who_is_new_has_routes_before_its_first_step(
  served: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
  """However late its control connection is read."""
  crew, inform = served.backend.crew, served.backend.crew.inform

  def late(each: Mapping[int, Any], op: str) -> None:
    inform({r: a for r, a in each.items() if (r, op) != (0, "routes")}, op)

  def progress(event: Event) -> None:
    assert "no routes yet" not in event.get("text", "")

  monkeypatch.setattr(crew, "inform", late)
  served(lost(0), progress=progress)
  assert steps_of(served(progress=progress), 0)


def test_a_probe_between_a_step_and_its_commit_spoils_nothing(
  served: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
  backend, finished = served.backend, served.backend.finished
  said: list[str] = []

  def probing(wait_s: float) -> list[Stepped]:
    # Steps end while the probe is waited for, too: it isn't asked again then.
    waited_for = said[-1:] == [""]
    under_way = len(backend._running) == len(ATTENTION)
    if under_way and not waited_for and len(said) < 3:
      said.append("")
      said[-1] = backend.execute(rm.Verify(), ()).detail
    return finished(wait_s)

  monkeypatch.setattr(backend, "finished", probing)
  served()
  assert said == ["canary equal"] * 3


def test_workers_of_both_roles_at_once(served: Engine) -> None:
  events = served(lost(3, 1))
  assert lost_ranks(events) == [1, 3]
  assert steps_of(between(events, "failure", "redundancy"), 0)
  assert len(actions(events, "Rejoin")) == 2


def test_experts_whose_shadow_dies_with_them_are_read_again(
  served: Engine,
) -> None:
  slots = served.backend.view().slots
  shared = [
    (a, b) for a in EXPERTS for b in EXPERTS
    if a < b and set(slots[a]) & set(slots[b]) - {-1}
  ]  # fmt: skip
  events = served(lost(*shared[0]))
  assert lost_ranks(events) == list(shared[0])
  assert actions(events, "CopyExperts")


def test_an_attention_worker_during_the_recovery_of_an_expert_worker(
  served: Engine,
) -> None:
  events = served(lost(5), lost(0, at_step=None, during_recovery=1))
  assert lost_ranks(events) == [0, 5]


def test_replacements_are_lost_as_their_predecessors_were(
  served: Engine,
) -> None:
  """The second faults wait until the first are repaired."""
  before = {r: served.backend.crew.mate(r).incarnation for r in (0, 3)}
  for _ in range(2):
    events = served(lost(3), lost(0, at_step=14, phase="prefill"))
    assert lost_ranks(events) == [0, 3]
  for rank, incarnation in before.items():
    assert served.backend.crew.mate(rank).incarnation == incarnation + 2


@pytest.mark.parametrize("rank", [1, 4])
def test_who_leaves_in_time_takes_nothing_along(
  served: Engine, rank: int
) -> None:
  leaving = Fault("rank_leaving", (rank,), at_step=12, deadline_s=5.0)
  events = served(leaving, requests=FEW)
  assert failures(events) == [("RanksLeaving", [rank])]
  assert sum(moved(events).values()) == 0


@pytest.mark.parametrize(("rank", "resume_s"), [(1, 0.8), (4, None), (4, 0.8)])
def test_who_is_stuck_is_fenced_refused_and_killed(
  served: Engine, rank: int, resume_s: float | None
) -> None:
  stuck = Fault("rank_stuck", (rank,), at_step=12, resume_s=resume_s)
  old = served.backend.crew.mate(rank)
  assert old.process is not None

  def progress(event: Event) -> None:
    # Before a successor is there, for whose sake it would be refused too.
    if event.get("name") == "LaunchRank" and rank in ATTENTION:
      assert_refused(served, rank, old.incarnation)

  events = served(stuck, until="redundancy", progress=progress)
  assert failures(events) == [("RanksLost", [rank])]
  texts = kinds(events, "warning", "text")
  assert f"rank {rank} is alive and does not answer: fenced" in texts
  gone = pathlib.Path(f"/proc/{old.process.pid}")
  served.until(lambda: not gone.exists())


def assert_refused(served: Engine, rank: int, incarnation: int) -> None:
  """No expert worker takes anything from who was fenced."""
  crew = served.backend.crew
  ghost = Peers(rank, incarnation, crew.authkey, lambda rank: True)
  for expert in EXPERTS:
    up = crew.mate(expert).up
    assert up is not None
    assert up.desk is not None
    give_up = time.monotonic() + 5.0  # for it to hear of the fence
    while ghost_gets_in(ghost, expert, up.desk):
      assert time.monotonic() < give_up
  ghost.close()


def ghost_gets_in(ghost: Peers, expert: int, desk: Address) -> bool:
  try:
    ghost.connect(expert, desk, 0)
  except ConnectionError as error:
    assert "is fenced up to" in str(error)  # noqa: PT017
    return False
  ghost.disconnect(expert)
  return True


def test_who_is_held_up_for_a_moment_serves_again(served: Engine) -> None:
  """Attention workers heal it at once; then it answers, and nobody is lost."""
  old = served.pid(3)
  events = served(Fault("rank_stuck", (3,), at_step=12, resume_s=0.2))
  assert failures(events) == []
  assert 3 in {e["rank"] for e in of_kind(events, "healed")}
  assert served.pid(3) == old
  # It is used again, as the next one to look for it finds.
  again = served(lost(3, inside="experts"))
  assert 3 in {e["rank"] for e in of_kind(again, "healed")}


@pytest.mark.parametrize("kind", ["link_cut", "link_slow"])
def test_a_bad_link_hurts_nobody_else(served: Engine, kind: str) -> None:
  delay_s = 0.02 if kind == "link_slow" else None
  events = served(
    Fault(kind, (0, 3), at_step=12, delay_s=delay_s, resume_s=MEND_S)
  )
  assert of_kind(events, "step_failed") == []
  # Slow isn't cut.
  assert failures(events) == [("LinkLost", [0, 3])] * (kind == "link_cut")


def test_a_straggler_changes_no_token(served: Engine) -> None:
  served(Fault("straggler", (0,), at_step=12, slowdown=4.0))


def test_nothing_is_left_of_all_these_replacements(served: Engine) -> None:
  """In who lived through them, and on this side."""
  held = {r: served.held(r) for r in (*ATTENTION, *EXPERTS)}
  fresh = {
    role: min(held[r] for r in ranks)
    for role, ranks in (("a", ATTENTION), ("e", EXPERTS))
  }
  for rank, (files, threads) in held.items():
    least = fresh["a" if rank in ATTENTION else "e"]
    assert files <= least[0] + FILES, held
    assert threads <= least[1] + THREADS, held


def test_stores_that_stop_or_end_hold_nobody_up_for_long(
  served: Engine,
) -> None:
  """Of two, then of the last one; whoever needs KV then is prefilled."""
  faults = Fault("store_lost", (), at_step=6), lost(0, at_step=40)
  events = served(*faults, requests=FEW)
  texts = " ".join(kinds(events, "warning", "text"))
  assert "KV store 0 is gone: requests of ranks [0] stream to another" in texts
  assert moved(events).keys() == {"restore"}

  stores = served.backend.kv._stores
  assert stores is not None
  (pid,) = stores.pids.values()

  def stop(event: Event) -> None:
    if event["event"] == "step" and stores.pids:
      os.kill(pid, signal.SIGSTOP)

  start = time.monotonic()
  events = served(lost(0), requests=FEW, progress=stop)
  assert time.monotonic() - start < 2 * STORE_S + 10.0
  texts = " ".join(kinds(events, "warning", "text"))
  assert "KV store 1 is given up" in texts
  assert moved(events).keys() == {"recompute"}
  assert {"RestoreKV", "CopyExperts", "LaunchRank", "Rejoin"} <= served.seen
