"""The scenarios of a disaggregated deployment strike whom they name."""

import pytest

from resilient_moe.faults import (
  LINK_KINDS,
  PROCESS_KINDS,
  SCENARIOS,
  SPLIT_SCENARIOS,
  Injector,
  Moment,
  check_roles,
  scenario,
  scenario_names,
)

# (attention ranks, ranks); 0: collocated.
SHAPES = [(0, 4), (0, 8), (1, 3), (2, 6), (3, 8)]
SEEDS = range(20)
EVERY = sorted({*SCENARIOS, *SPLIT_SCENARIOS})
SPLIT = sorted(SPLIT_SCENARIOS)
# The roles that each strikes, fault by fault.
STRIKES = {
  "ew_lost": ["e"],
  "aw_lost": ["a"],
  "ew_in_experts": ["e"],
  "ew_in_exchange": ["e"],
  "aw_in_attention": ["a"],
  "aw_in_exchange": ["a"],
  "aw_in_prefill": ["a"],
  "two_ews": ["ee"],
  "two_aws_apart": ["a", "a"],
  "ew_and_aw": ["ea"],
  "ew_then_aw_during_recovery": ["e", "a"],
  "link_cut": ["ae"],
  "link_slow": ["ae"],
  "store_and_aw": ["", "a"],
}
# Those that need but one attention rank, and two expert ranks.
ONE_AW = {
  "ew_lost",
  "ew_in_experts",
  "ew_in_exchange",
  "link_cut",
  "link_slow",
  "killed_twenty_times_apart",
}
MADE = {
  (0, 4): set(),
  (0, 8): set(),
  (1, 3): ONE_AW,
  (2, 6): set(SPLIT) - {"two_aws_apart"},
  (3, 8): set(SPLIT),
}


def roles(fault, attention: int) -> str:
  return "".join("a" if r < attention else "e" for r in fault.ranks)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_scenario_fits_its_deployment(shape, name):
  attention, ranks = shape
  if name in SPLIT_SCENARIOS and name not in MADE[shape]:
    with pytest.raises(ValueError, match=f"{name}' needs"):
      scenario(name, ranks, attention=attention)
    return
  for seed in SEEDS:
    schedule = scenario(name, ranks, seed, attention=attention)
    assert check_roles(schedule, attention, ranks) == schedule
    assert schedule == scenario(name, ranks, seed, attention=attention)
    travelled = Injector.from_json(Injector(schedule).to_json(), ranks)
    assert travelled.schedule == schedule
    if name in STRIKES:
      assert [roles(f, attention) for f in schedule] == STRIKES[name]
    if name in SCENARIOS:
      assert schedule == scenario(name, ranks, seed), "whatever the roles"


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]])
def test_one_of_each_role_survives(shape, name):
  attention, ranks = shape
  if name not in MADE[shape] or name == "killed_twenty_times_apart":
    return
  for seed in SEEDS:
    schedule = scenario(name, ranks, seed, attention=attention)
    struck = [r for f in schedule for r in f.ranks if f.kind not in LINK_KINDS]
    assert len(struck) == len(set(struck))
    left = set(range(ranks)) - set(struck)
    assert min(left) < attention <= max(left)


def test_the_smallest_deployments_are_served():
  """One rank less of either role is refused, and said which."""
  for name, chosen in SPLIT_SCENARIOS.items():
    aws, ews = chosen.min_attention, chosen.min_experts
    if name == "killed_twenty_times_apart":
      continue
    assert scenario(name, aws + ews, attention=aws)
    if aws > 1:
      with pytest.raises(
        ValueError, match=f"needs at least {aws} attention ranks, not {aws - 1}"
      ):
        scenario(name, aws - 1 + ews, attention=aws - 1)
    if ews > 1:
      with pytest.raises(
        ValueError, match=f"needs at least {ews} expert ranks, not {ews - 1}"
      ):
        scenario(name, aws + ews - 1, attention=aws)


@pytest.mark.parametrize("name", sorted(set(SPLIT) - {"link_slow"}))
def test_two_ranks_survive_nothing_but_a_slow_link(name):
  assert scenario("link_slow", 2, attention=1)
  with pytest.raises(ValueError, match=f"{name}' needs at least"):
    scenario(name, 2, attention=1)


@pytest.mark.parametrize("name", SPLIT)
def test_every_scenario_is_described_and_tagged(name):
  chosen = SPLIT_SCENARIOS[name]
  assert chosen.about.endswith(".")
  kinds = {fault.kind for fault in scenario(name, 8, attention=3)}
  assert ("process" in chosen.tags) == bool(kinds & set(PROCESS_KINDS))
  assert ("link" in chosen.tags) == bool(kinds & set(LINK_KINDS))
  assert ("replaced" in chosen.tags) == (name == "killed_twenty_times_apart")


@pytest.mark.parametrize("name", SPLIT)
def test_time_and_rank_are_obeyed(name):
  first = SPLIT_SCENARIOS[name].first
  for rank in range(8):
    role = "attention" if rank < 3 else "experts"
    if first not in (role, "any"):
      mine = "0 to 2" if first == "attention" else "3 to 7"
      with pytest.raises(
        ValueError,
        match=f"rank {rank} can't be the first .* choose from ranks {mine}",
      ):
        scenario(name, 8, attention=3, rank=rank)
      continue
    schedule = scenario(name, 8, at_step=11, rank=rank, attention=3)
    struck = next(fault.ranks for fault in schedule if fault.ranks)
    assert rank in struck if name in LINK_KINDS else struck[0] == rank
    drawn = "random" in SPLIT_SCENARIOS[name].tags
    assert 11 <= schedule[0].at_step <= (21 if drawn else 11)


def test_seeds_vary_whom_they_strike():
  for name in SPLIT:
    drawn = {
      scenario(name, 8, seed, attention=3)[-1].ranks for seed in range(40)
    }
    both = {"link_cut", "link_slow", "ew_and_aw"}
    least = 9 if name in both else 3
    assert len(drawn) >= least, name


def test_a_seed_strikes_the_same_rank_in_all_of_them():
  for seed in SEEDS:
    (cut,) = scenario("link_cut", 8, seed, attention=3)
    aw, ew = cut.ranks
    for name in set(STRIKES) - set(LINK_KINDS):
      schedule = scenario(name, 8, seed, attention=3)
      first = next(fault.ranks[0] for fault in schedule if fault.ranks)
      assert first in (aw, ew), name


@pytest.mark.parametrize(
  ("name", "inside", "phase"),
  [
    ("ew_lost", None, "any"),
    ("aw_lost", None, "any"),
    ("ew_in_experts", "experts", "any"),
    ("ew_in_exchange", "exchange", "any"),
    ("aw_in_attention", "attention", "any"),
    ("aw_in_exchange", "exchange", "any"),
    ("aw_in_prefill", None, "prefill"),
  ],
)
def test_the_single_losses_say_where(name, inside, phase):
  (fault,) = scenario(name, 6, attention=2)
  assert (fault.kind, fault.inside) == ("rank_lost", inside)
  assert fault.phase == phase


def test_two_expert_ranks_are_no_neighbours():
  (fault,) = scenario("two_ews", 6, rank=5, attention=2)
  assert fault.ranks == (5, 3)


def test_the_second_attention_rank_waits_for_the_recovery_of_the_first():
  injector = Injector(scenario("two_aws_apart", 8, rank=2, attention=3))
  (first,) = injector.poll(Moment(20, 0.0, 0))
  assert injector.poll(Moment(40, 9.0, 0, recovery_actions=3)) == []
  assert injector.poll(Moment(29, 9.0, 0)) == []
  (second,) = injector.poll(Moment(30, 9.0, 0))
  assert (first.ranks, second.ranks) == ((2,), (0,))


def test_the_attention_rank_goes_inside_the_recovery_of_the_expert_rank():
  injector = Injector(
    scenario("ew_then_aw_during_recovery", 8, attention=3, after_ready=True)
  )
  assert injector.poll(Moment(20, 0.0, 0, ready=False)) == []
  assert len(injector.poll(Moment(20, 0.0, 0))) == 1
  assert injector.poll(Moment(21, 0.1, 0)) == []
  inside = Moment(21, 0.1, 0, recovery_actions=1, ready=False)
  assert len(injector.poll(inside)) == 1


def test_links_are_cut_or_slow_until_the_end():
  (cut,) = scenario("link_cut", 6, rank=4, attention=2)
  (slow,) = scenario("link_slow", 6, rank=1, attention=2)
  assert (cut.kind, cut.delay_s, cut.resume_s) == ("link_cut", None, None)
  assert (slow.kind, slow.delay_s, slow.resume_s) == ("link_slow", 0.02, None)


def test_the_store_goes_before_the_attention_rank():
  store, rank = scenario("store_and_aw", 6, at_step=20, rank=1, attention=2)
  assert (store.kind, store.at_step) == ("store_lost", 20)
  assert (rank.kind, rank.ranks, rank.at_step) == ("rank_lost", (1,), 24)


def test_names_are_those_of_the_deployment():
  assert scenario_names() == tuple(SCENARIOS)
  assert scenario_names(2) == (*SCENARIOS, *SPLIT_SCENARIOS)
  assert not set(SCENARIOS) & set(SPLIT_SCENARIOS)


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("ew_lots", {}, "unknown scenario 'ew_lots'; choose from none, .*lost$"),
    ("ew_lots", {"attention": 2}, "'ew_lots'; choose from none, .*, ew_lost,"),
    ("ew_lost", {}, "'ew_lost' needs a disaggregated .*; choose from none, r"),
    ("ew_lost", {"attention": 8}, "attention is 8; of 8 ranks .* from 1 to 7"),
    ("none", {"attention": -1}, "attention is -1"),
    ("ew_lost", {"attention": 2, "rank": 8}, "rank 8 is out of range; 8 ranks"),
    ("link_cut", {"attention": 2, "rank": -1}, "rank -1 is out of range"),
  ],
)
def test_what_can_not_be_is_refused(name, fields, message):
  with pytest.raises(ValueError, match=message):
    scenario(name, 8, **fields)
