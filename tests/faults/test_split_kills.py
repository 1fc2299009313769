"""Twenty kills among two roles: one at a time, and never the last of a role."""

import pytest

from resilient_moe.faults import scenario

NAME = "killed_twenty_times_apart"
SEEDS = range(20)


def test_twenty_kills_wait_for_replacements_and_spare_the_last_of_a_role():
  for attention, ranks in ((1, 3), (2, 6), (3, 8), (7, 8)):
    hit = set()
    for seed in SEEDS:
      schedule = scenario(NAME, ranks, seed, attention=attention)
      assert len(schedule) == 20
      for i, fault in enumerate(schedule):
        assert fault.after_ready
        assert len(fault.ranks) == 1
        assert 20 + 10 * i <= fault.at_step <= 30 + 10 * i
        hit |= set(fault.ranks)
    alone = {0} if attention == 1 else {7} if attention == 7 else set()
    assert hit == set(range(ranks)) - alone


def test_twenty_kills_take_either_role_as_often():
  """Although there are seven times as many expert ranks."""
  kills = [
    fault.ranks[0] < 2
    for seed in range(100)
    for fault in scenario(NAME, 16, seed, attention=2)
  ]
  assert 0.45 < sum(kills) / len(kills) < 0.55


def test_twenty_kills_refuse_what_they_can_not_spare():
  with pytest.raises(ValueError, match="at least 2 ranks of a role, not 1 att"):
    scenario(NAME, 2, attention=1)
  with pytest.raises(ValueError, match="rank 0 is the only .* ranks 1 to 2"):
    scenario(NAME, 3, attention=1, rank=0)
  with pytest.raises(ValueError, match="rank 3 is the only .* ranks 0 to 2"):
    scenario(NAME, 4, attention=3, rank=3)
