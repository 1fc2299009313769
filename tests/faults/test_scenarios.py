"""Every named scenario is legal, repeats, and does what its name says."""

import pytest

from resilient_moe.faults import (
  KINDS,
  LINK_KINDS,
  PROCESS_KINDS,
  RANKLESS_KINDS,
  SCENARIOS,
  Injector,
  Moment,
  check_ranks,
  ring_neighbour,
  scenario,
)

NAMES = sorted(SCENARIOS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 10240])
def test_every_scenario_fits_its_ranks_and_leaves_one_alive(name, ranks):
  if ranks < SCENARIOS[name].min_ranks:
    with pytest.raises(ValueError, match=f"needs at least .* not {ranks}"):
      scenario(name, ranks)
    return
  for seed in range(20):
    schedule = check_ranks(scenario(name, ranks, seed), ranks)
    struck = [rank for fault in schedule for rank in fault.ranks]
    if "replaced" in SCENARIOS[name].tags:
      assert all(f.after_ready and len(f.ranks) == 1 for f in schedule)
    else:
      assert len(struck) == len(set(struck)) < ranks
    assert schedule == scenario(name, ranks, seed)


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_is_described_and_tagged(name):
  assert SCENARIOS[name].about.endswith(".")
  assert SCENARIOS[name].tags


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none"}))
def test_time_and_rank_are_obeyed(name):
  schedule = scenario(name, 8, at_step=11, rank=6)
  struck = [rank for fault in schedule for rank in fault.ranks]
  assert struck[:1] == [6] or {f.kind for f in schedule} <= set(RANKLESS_KINDS)
  drawn = "random" in SCENARIOS[name].tags
  assert schedule[0].at_step == 11 or drawn and 11 < schedule[0].at_step < 51


def test_seeds_vary_the_rank_and_the_random_step():
  assert (
    len({scenario("rank_lost_decode", 8, s)[0].ranks for s in range(40)}) > 5
  )
  assert (
    len({scenario("random", 8, s, rank=1)[0].at_step for s in range(9)}) > 5
  )


def test_the_single_losses_name_their_phase():
  assert scenario("rank_lost_decode", 8)[0].phase == "decode"
  assert scenario("rank_lost_prefill", 8)[0].phase == "prefill"


def test_neighbours_are_a_rank_and_the_holder_of_its_checkpoint():
  (fault,) = scenario("neighbours", 8, rank=7)
  assert fault.ranks == (7, 0)
  assert ring_neighbour(7, 8) == 0


def test_two_at_once_are_no_neighbours():
  (fault,) = scenario("two_at_once", 8, rank=6)
  assert fault.ranks == (6, 2)


def test_one_after_another_keeps_apart():
  steps = [fault.at_step for fault in scenario("one_after_another", 8)]
  assert steps == [20, 30, 40, 50]


def test_during_recovery_strikes_inside_the_first_recovery():
  injector = Injector(scenario("during_recovery", 8, rank=1, after_ready=True))
  (first,) = injector.poll(Moment(20, 0.0, 0))
  inside = Moment(20, 0.1, 0, recovery_actions=2, ready=False)
  (second,) = injector.poll(inside)
  assert (first.ranks, second.ranks) == ((1,), (5,))


def test_maintenance_warns_before_the_loss():
  injector = Injector(scenario("maintenance", 8, rank=1))
  (warning,) = injector.poll(Moment(20, 5.0, 0))
  (loss,) = injector.poll(Moment(25, 5.0 + warning.deadline_s, 0))
  assert (warning.kind, loss.kind) == ("rank_leaving", "rank_lost")


def test_after_ready_reaches_the_first_fault():
  injector = Injector(scenario("rank_lost_decode", 8, after_ready=True))
  assert injector.poll(Moment(30, 0.0, 0, ready=False)) == []
  assert len(injector.poll(Moment(31, 0.0, 0, ready=True))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_tag_says_what_only_processes_can_do(name):
  kinds = {fault.kind for fault in scenario(name, 8)}
  needed = bool(kinds & set(PROCESS_KINDS))
  assert ("process" in SCENARIOS[name].tags) == needed


def test_every_kind_of_fault_has_a_scenario():
  named = {fault.kind for name in NAMES for fault in scenario(name, 8)}
  # Links are between ranks that differ in what they do: tests/faults/test_split
  assert named == set(KINDS) - set(LINK_KINDS)


def test_equal_seeds_strike_as_they_did_when_runs_were_published():
  """A campaign that goes on, and a published table, rely on these draws."""
  drawn = [scenario("rank_lost_decode", 8, s)[0].ranks[0] for s in range(8)]
  assert drawn == [6, 0, 3, 7, 0, 0, 5, 5]
  assert [f.ranks for f in scenario("two_at_once", 8)] == [(6, 2)]
  assert scenario("random", 8)[0].at_step == 55
  again = scenario("killed_again_and_again", 8)
  assert [f.ranks for f in again] == [(6,), (5,), (3,), (6,), (6,)]
  assert [f.at_step for f in again] == [29, 34, 47, 60, 69]
  twenty = scenario("killed_twenty_times", 8)
  assert [(f.ranks[0], f.at_step) for f in twenty[-2:]] == [(6, 210), (0, 211)]


def test_a_stuck_rank_returns_or_not():
  assert scenario("rank_stuck", 8)[0].resume_s is None
  assert scenario("rank_stuck_returns", 8)[0].resume_s == 0.8


def test_the_store_goes_before_the_rank_that_relied_on_it():
  store, rank = scenario("store_and_rank", 8, at_step=20, rank=3)
  assert (store.kind, store.at_step) == ("store_lost", 20)
  assert (rank.kind, rank.ranks, rank.at_step) == ("rank_lost", (3,), 24)


def test_again_and_again_waits_for_the_replacements():
  faults = scenario("killed_again_and_again", 4, seed=2, at_step=20)
  assert len(faults) == 5
  for i, fault in enumerate(faults):
    assert 20 + 10 * i <= fault.at_step <= 30 + 10 * i
  injector, struck = Injector(faults), []
  for step in range(20, 80):
    # Long past the time of several, still one at a time.
    now = injector.poll(Moment(step, 0.0, 0, ready=step >= 60))
    struck += [(step, fault.ranks) for fault in now]
    injector.returned(rank for fault in now for rank in fault.ranks)
  assert struck[:3] == [(60 + i, faults[i].ranks) for i in range(3)]
  assert [ranks for _, ranks in struck] == [fault.ranks for fault in faults]


def test_again_and_again_may_strike_a_replacement():
  drawn = [scenario("killed_again_and_again", 4, seed) for seed in range(9)]
  twice = [faults for faults in drawn if len({f.ranks for f in faults}) < 4]
  assert twice, "some seed draws a rank again"
  assert len({tuple(f.at_step for f in faults) for faults in drawn}) > 5


def test_unknown_names_and_ranks_are_refused():
  with pytest.raises(
    ValueError, match="'rank_lots'; choose from none, rank_lost"
  ):
    scenario("rank_lots", 8)
  with pytest.raises(ValueError, match="rank 8 is out of range; 8 ranks"):
    scenario("rank_lost_decode", 8, rank=8)
