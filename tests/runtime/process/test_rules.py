"""The rules that turn probes and step times into decisions."""

import dataclasses

import pytest

from resilient_moe.runtime.process import rules

LIMITS = rules.Limits(straggler_window=4)
EVEN = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
ONE_SLOW = {**EVEN, 2: 5.0}


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("probe_interval_s", 0.0),
    ("probe_interval_s", float("nan")),
    ("misses", 0),
    ("misses", 2.5),
    ("stuck_s", 0.02),  # 3 misses of 0.01 s take longer
    ("stuck_s", float("inf")),
    ("overdue_factor", 0.5),
    ("overdue_min_s", -1.0),
    ("grace_s", -0.1),
    ("straggler_ratio", 1.0),
    ("straggler_ratio", float("nan")),
    ("straggler_window", 0),
    ("straggler_window", 1.5),
  ],
)
def test_a_limit_out_of_range_is_named_with_its_value(field, value):
  with pytest.raises(ValueError, match=f"{field} is {value}; needed"):
    dataclasses.replace(LIMITS, **{field: value})


def test_the_limits_themselves_are_in_range():
  edge = {
    "stuck_s": LIMITS.misses * LIMITS.probe_interval_s,
    "overdue_factor": 1.0, "overdue_min_s": 0.0, "grace_s": 0.0,
  }  # fmt: skip
  limits = dataclasses.replace(LIMITS, **edge)
  assert dataclasses.asdict(limits) == {**dataclasses.asdict(LIMITS), **edge}


def test_suspected_are_those_that_missed_enough_in_order():
  missed = {3: 3, 1: 7, 0: 2, 2: 0}
  assert rules.suspected(missed, LIMITS) == (1, 3)
  assert rules.suspected({}, LIMITS) == ()


def test_without_history_a_step_is_overdue_after_the_minimum():
  clock = rules.StepClock(LIMITS)
  assert not clock.overdue(0.499)
  assert clock.overdue(0.5)


def test_overdue_follows_the_median_once_that_is_longer():
  clock = rules.StepClock(LIMITS)
  for seconds in (0.1, 0.1, 60.0):  # the first step compiles
    clock.finished(seconds)
  assert not clock.overdue(1.99)
  assert clock.overdue(2.01)


def test_short_steps_do_not_lower_the_minimum():
  clock = rules.StepClock(LIMITS)
  clock.finished(0.001)
  assert not clock.overdue(0.4)


def test_only_the_last_64_steps_count():
  clock = rules.StepClock(LIMITS)
  for seconds in [1.0] * 64 + [0.1] * 33:
    clock.finished(seconds)
  assert clock.overdue(2.1)  # 31 of 1 s, 33 of 0.1 s
  clock = rules.StepClock(LIMITS)
  for seconds in [1.0] * 64 + [0.1] * 31:
    clock.finished(seconds)
  assert not clock.overdue(19.9)  # 33 of 1 s, 31 of 0.1 s


def test_stuck_needs_both_silence_and_an_overdue_step():
  clock = rules.StepClock(LIMITS)
  silence = {3: 0.5, 0: 0.0, 2: 9.0, 1: 0.49}
  assert rules.stuck(silence, 0.6, clock, LIMITS) == (2, 3)
  assert rules.stuck(silence, 0.4, clock, LIMITS) == ()
  assert rules.stuck({0: 0.1, 1: 0.1}, 99.0, clock, LIMITS) == ()


def feed(stragglers, *steps):
  """Reports after each step."""
  reports = []
  for step in steps:
    stragglers.add(step)
    reports.append(stragglers.reports())
  return reports


def test_a_rank_slow_in_two_windows_is_reported_once_at_their_end():
  stragglers = rules.Stragglers(LIMITS)
  reports = feed(stragglers, *[ONE_SLOW] * 16)
  assert [i for i, r in enumerate(reports) if r] == [7]
  assert reports[7] == ((2, 5.0),)


def test_the_slowdown_is_that_of_the_newest_window():
  stragglers = rules.Stragglers(LIMITS)
  reports = feed(stragglers, *[ONE_SLOW] * 4, *[{**EVEN, 2: 8.0}] * 4)
  assert reports[-1] == ((2, 8.0),)


def test_slow_means_on_average_and_at_the_ratio():
  stragglers = rules.Stragglers(LIMITS)
  exactly = [EVEN, EVEN, EVEN, {**EVEN, 2: 9.0}] * 2
  assert feed(stragglers, *exactly)[-1] == ((2, 3.0),)
  below = [EVEN, EVEN, EVEN, {**EVEN, 2: 8.9}] * 2
  assert not any(feed(rules.Stragglers(LIMITS), *below))


def test_two_slow_windows_with_a_good_one_between_are_not_reported():
  steps = [*[ONE_SLOW] * 4, *[EVEN] * 4, *[ONE_SLOW] * 4, *[EVEN] * 4]
  assert not any(feed(rules.Stragglers(LIMITS), *steps))


def test_one_long_pause_is_not_a_slow_rank():
  steps = [EVEN] * 16
  steps[3] = steps[4] = {**EVEN, 1: 8.0}  # over 3 .. 6, not 0 .. 3, 4 .. 7
  assert not any(feed(rules.Stragglers(LIMITS), *steps))
  steps[5] = {**EVEN, 1: 1000.0}  # one window
  assert not any(feed(rules.Stragglers(LIMITS), *steps))


def test_a_forgotten_rank_is_reported_after_two_new_windows():
  stragglers = rules.Stragglers(LIMITS)
  feed(stragglers, *[ONE_SLOW] * 8)
  stragglers.forget(2)
  reports = feed(stragglers, *[ONE_SLOW] * 8)
  assert [i for i, r in enumerate(reports) if r] == [7]
  stragglers.forget(7)  # unknown: nothing to forget


def test_a_rank_forgotten_within_a_window_is_left_out_of_it():
  stragglers = rules.Stragglers(LIMITS)
  feed(stragglers, *[ONE_SLOW] * 6)
  stragglers.forget(2)
  reports = feed(stragglers, *[ONE_SLOW] * 10)
  assert [i for i, r in enumerate(reports) if r] == [9]  # 2, then 4 and 4


def test_a_rank_that_misses_a_step_is_left_out_of_that_window():
  without = {r: s for r, s in ONE_SLOW.items() if r != 2}
  steps = [ONE_SLOW] * 16
  steps[5] = without
  reports = feed(rules.Stragglers(LIMITS), *steps)
  assert [i for i, r in enumerate(reports) if r] == [15]


def test_a_rank_that_joins_counts_from_the_next_window():
  joined = {**EVEN, 9: 4.0}
  reports = feed(rules.Stragglers(LIMITS), EVEN, *[joined] * 11)
  assert [i for i, r in enumerate(reports) if r] == [11]
  assert reports[11] == ((9, 4.0),)


def test_of_two_ranks_the_slower_is_found_and_of_one_none():
  reports = feed(rules.Stragglers(LIMITS), *[{0: 4.0, 1: 1.0}] * 8)
  assert reports[-1] == ((0, 4.0),)
  assert not any(feed(rules.Stragglers(LIMITS), *[{0: 4.0}] * 8))
  assert not any(feed(rules.Stragglers(LIMITS), *[{}] * 8))


def test_ranks_without_any_work_are_not_slow():
  assert not any(feed(rules.Stragglers(LIMITS), *[{0: 0.0, 1: 0.0}] * 8))


def test_equal_ranks_with_noise_up_to_twice_are_never_reported(rng):
  for _ in range(20):
    n_ranks = int(rng.integers(2, 9))
    limits = rules.Limits(straggler_window=int(rng.integers(1, 9)))
    stragglers = rules.Stragglers(limits)
    for _ in range(100):
      step_s = rng.uniform(1e-3, 1.0)  # common to all: prefill, decode
      present = [r for r in range(n_ranks) if rng.random() < 0.95]
      local = {r: step_s * rng.uniform(1.0, 2.0) for r in present}
      stragglers.add(local)
      assert stragglers.reports() == ()


def test_among_noisy_ranks_the_slow_one_is_found(rng):
  slow = int(rng.integers(5))
  stragglers = rules.Stragglers(LIMITS)
  for _ in range(8):
    noisy = {r: float(rng.uniform(1.0, 2.0)) for r in range(5)}
    stragglers.add({**noisy, slow: 8.0 * noisy[slow]})
  ((rank, slowdown),) = stragglers.reports()
  assert rank == slow
  assert 4.0 <= slowdown <= 16.0
