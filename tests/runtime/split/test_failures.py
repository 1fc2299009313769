"""What a loss stops, what goes on meanwhile, and what is compiled: nothing."""

import random

import pytest

from resilient_moe.faults import Schedule
from resilient_moe.report.history import of_kind
from tests.runtime.drive import Driver
from tests.runtime.harness import MODEL, Event, Host, Lab, make_requests
from tests.runtime.split.apart import (
  apart,
  cut,
  exact,
  failures,
  home,
  lost,
  names,
)

LAYERS = range(MODEL.n_layers)


def run(lab: Lab, policy: str, faults: Schedule, **fields) -> Host:
  host = Host(lab, apart(lab, policy, faults, **fields))
  host.run()
  exact(lab, host)
  return host


def between(events: list[Event], first: str, last: str) -> list[Event]:
  kinds = [e["event"] for e in events]
  start = kinds.index(first)
  return events[start : kinds.index(last, start)]


def seed_for(layer: int) -> int:
  """With which a fault whose place is given strikes in this layer."""
  draws = lambda s: random.Random(f"inside/{s}").randrange(len(LAYERS))
  return next(s for s in range(99) if draws(s) == layer)


@pytest.mark.parametrize("policy", ["tarragon", "mesh_shrink", "retry"])
def test_the_loss_of_an_attention_rank_pauses_its_requests_only(
  lab: Lab, policy: str
) -> None:
  host = run(lab, policy, (lost(1),))
  (fault,) = of_kind(host.events, "fault")
  at = home(host.events)
  assert {at[n] for n in fault["affected"]} == {1}
  meanwhile = between(host.events, "failure", "resumed")
  steps = of_kind(meanwhile, "step")
  assert {tuple(e["domain"]) for e in steps} == {(0,)}
  assert {at[n] for e in steps for n, *_ in e["emitted"]} == {0}
  assert len(steps) >= len(of_kind(meanwhile, "action"))
  assert len(of_kind(host.events, "step_failed")) == 1
  (resumed,) = of_kind(host.events, "resumed")
  assert set(resumed["paused"]) <= set(fault["affected"])


@pytest.mark.parametrize("inside", ["exchange", "experts"])
@pytest.mark.parametrize("layer", LAYERS)
def test_shadows_serve_in_the_same_step(
  lab: Lab, layer: int, inside: str
) -> None:
  fault = lost(3, inside=inside)
  host = run(lab, "tarragon", (fault,), seed=seed_for(layer))
  assert of_kind(host.events, "step_failed") == []
  (resumed,) = of_kind(host.events, "resumed")
  assert resumed["paused"] == []
  healed = of_kind(host.events, "healed")
  # Another attention rank may have nothing for it until a later layer.
  assert (healed[0]["rank"], healed[0]["layer"]) == (3, layer)
  assert all(e["rank"] == 3 and e["layer"] >= layer for e in healed)
  since = between(host.events, "fault", "step")
  assert of_kind(since, "healed")[:1] == healed[:1], "before the plan"
  assert healed[0]["experts"] >= 1


@pytest.mark.parametrize("layer", LAYERS)
def test_without_shadows_the_step_is_done_again(lab: Lab, layer: int) -> None:
  fault = lost(3, inside="experts")
  host = run(lab, "mesh_shrink", (fault,), seed=seed_for(layer))
  # Whoever was in a step: one on each attention rank, at most.
  assert 1 <= len(of_kind(host.events, "step_failed")) <= 2
  assert of_kind(host.events, "healed") == []
  assert failures(host.events) == [("RanksLost", [3])]


def test_a_role_switch_and_replacements_compile_nothing(lab: Lab) -> None:
  faults = (lost(3), lost(0, at_step=60, after_ready=True))
  host = run(lab, "role_switch", faults, policy_kwargs={"replace": True})
  done = names(host.events)
  assert done.count("SwitchRole") == 2, "there and back"
  assert done.count("LaunchRank") == done.count("Rejoin") == 2
  assert host.compiled == 0


def test_shadows_and_replacements_compile_nothing(lab: Lab) -> None:
  faults = (lost(3), lost(1, at_step=60, after_ready=True))
  host = run(lab, "tarragon", faults)
  done = names(host.events)
  assert done.count("LaunchRank") == done.count("Rejoin") == 2
  assert host.compiled == 0


def test_a_loss_in_a_recovery_may_be_a_link(lab: Lab) -> None:
  """It is a link then, and no straggler."""
  faults = (lost(1, at_step=10), cut(0, 2, None, during_recovery=1))
  host = run(lab, "tarragon", faults)
  assert failures(host.events) == [("RanksLost", [1]), ("LinkLost", [0, 2])]


def test_what_a_lost_rank_has_sent_still_counts(lab: Lab) -> None:
  _, backend = Host(lab, apart(lab, "none")).start()
  driver = Driver(backend)
  driver.accept(make_requests(n=4))
  driver.step(3)
  before = dict(backend.store.traffic())
  assert min(before[1]) > 0
  backend.store.lose(1)
  assert backend.store.traffic() == before
  backend.close()


def test_what_waits_till_all_are_back_comes_one_at_a_time(lab: Lab) -> None:
  """Also while the first is still on its way to its place in a step."""
  faults = tuple(
    lost(rank, at_step=10, after_ready=True) for rank in (0, 1, 0)
  )
  host = run(lab, "tarragon", faults)
  found = [ranks for _, ranks in failures(host.events)]
  assert found == [[0], [1], [0]]
