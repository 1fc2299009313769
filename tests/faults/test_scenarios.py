"""Every named scenario is legal, repeats, and does what its name says."""

import pytest

from resilient_moe.faults import (
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
    assert len(struck) == len(set(struck)) < ranks
    assert schedule == scenario(name, ranks, seed)


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_is_described_and_tagged(name):
  assert SCENARIOS[name].about.endswith(".")
  assert SCENARIOS[name].tags


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none"}))
def test_time_and_rank_are_obeyed(name):
  first = scenario(name, 8, at_step=11, rank=6)[0]
  assert first.ranks[0] == 6
  assert first.at_step == 11 or (name == "random" and 11 <= first.at_step < 51)


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


def test_unknown_names_and_ranks_are_refused():
  with pytest.raises(
    ValueError, match="'rank_lots'; choose from none, rank_lost"
  ):
    scenario("rank_lots", 8)
  with pytest.raises(ValueError, match="rank 8 is out of range; 8 ranks"):
    scenario("rank_lost_decode", 8, rank=8)
