"""When a fault strikes, what a dict may say, and what is refused."""

import dataclasses

import pytest

from resilient_moe.faults import (
  Fault,
  Moment,
  check_ranks,
  due,
  parse_schedule,
  random_schedule,
)

BEFORE = Moment(step=19, t_s=0.9, emitted_tokens=99)
AT = Moment(step=20, t_s=1.0, emitted_tokens=100)


def at(**changes: object) -> Moment:
  return dataclasses.replace(AT, **changes)


@pytest.mark.parametrize(
  "trigger", [{"at_step": 20}, {"at_s": 1.0}, {"at_tokens": 100}]
)
def test_strikes_at_its_moment_and_not_before(trigger):
  schedule = (Fault("rank_lost", (3,), **trigger),)
  assert due(schedule, (), BEFORE) == ()
  assert due(schedule, (), AT) == (0,)
  assert due(schedule, (), at(step=50, t_s=5.0, emitted_tokens=500)) == (0,)
  assert due(schedule, {0}, AT) == ()


@pytest.mark.parametrize(
  ("phase", "in_decode", "in_prefill"),
  [("any", (0,), (0,)), ("decode", (0,), ()), ("prefill", (), (0,))],
)
def test_a_phase_waits_for_its_step(phase, in_decode, in_prefill):
  schedule = (Fault("rank_lost", (3,), at_step=20, phase=phase),)
  assert due(schedule, (), at(in_prefill=False)) == in_decode
  assert due(schedule, (), at(in_prefill=True)) == in_prefill
  assert due(schedule, (), dataclasses.replace(BEFORE, in_prefill=True)) == ()


def test_during_recovery_counts_its_actions():
  schedule = (Fault("rank_lost", (3,), during_recovery=2),)
  assert due(schedule, (), AT) == ()
  assert due(schedule, (), at(recovery_actions=1)) == ()
  assert due(schedule, (), at(recovery_actions=2)) == (0,)
  assert due(schedule, (), at(recovery_actions=5)) == (0,)


def test_during_recovery_may_wait_for_a_moment_too():
  schedule = (Fault("rank_lost", (3,), at_step=21, during_recovery=0),)
  assert due(schedule, (), at(recovery_actions=3)) == ()
  assert due(schedule, (), at(step=21, recovery_actions=0)) == (0,)


def test_only_the_clock_brings_other_faults_into_a_recovery():
  schedule = (
    Fault("rank_lost", (0,), at_step=1),
    Fault("rank_lost", (1,), at_s=0.5),
    Fault("rank_lost", (2,), at_s=0.5, phase="decode"),
    Fault("rank_lost", (3,), at_tokens=1),
  )
  assert due(schedule, (), at(recovery_actions=0)) == (1,)
  assert due(schedule, (), AT) == (0, 1, 2, 3)


def test_the_clock_brings_no_part_of_a_step_into_a_recovery():
  schedule = (Fault("rank_lost", (1,), at_s=0.5, inside="exchange"),)
  assert due(schedule, (), at(recovery_actions=0)) == ()
  assert due(schedule, (), AT) == (0,)


def test_after_ready_waits():
  schedule = (Fault("rank_lost", (3,), at_step=20, after_ready=True),)
  assert due(schedule, (), at(ready=False)) == ()
  assert due(schedule, (), AT) == (0,)


def test_a_dict_is_parsed():
  item = {"kind": "rank_lost", "ranks": [3], "at_step": 20}
  assert parse_schedule([item], ranks=8) == (
    Fault("rank_lost", (3,), at_step=20),
  )
  warning = {
    "kind": "rank_leaving",
    "ranks": (1, 2),
    "at_s": 2,
    "deadline_s": 1,
  }
  (fault,) = parse_schedule([warning], ranks=8)
  assert (fault.ranks, fault.at_s, fault.deadline_s) == ((1, 2), 2, 1)
  assert parse_schedule([fault], ranks=8) == (fault,)
  assert parse_schedule([], ranks=8) == ()


def test_of_several_that_wait_one_strikes_at_a_time():
  """What strikes ends the readiness that the others wait for."""
  waiting = [Fault("rank_lost", (r,), at_step=20, after_ready=True)
             for r in (1, 2)]  # fmt: skip
  other = Fault("rank_lost", (3,), at_step=20)
  schedule = (waiting[0], other, waiting[1])
  assert due(schedule, (), AT) == (0, 1)
  assert due(schedule, {0, 1}, AT) == (2,)


@pytest.mark.parametrize("kind", ["store_lost", "supervisor_lost"])
def test_the_store_and_the_supervisor_are_no_ranks(kind):
  for ranks in ({}, {"ranks": []}, {"ranks": ()}):
    (fault,) = parse_schedule([{"kind": kind, "at_step": 3, **ranks}], ranks=2)
    assert fault.ranks == ()
    assert due((fault,), (), AT) == (0,)


def test_a_stuck_rank_may_go_on():
  item = {"kind": "rank_stuck", "ranks": [1], "at_step": 3}
  for_good, returns = parse_schedule([item, item | {"resume_s": 0.5}], ranks=2)
  assert (for_good.resume_s, returns.resume_s) == (None, 0.5)


def test_a_link_and_a_part_of_a_step_are_parsed():
  cut = {"kind": "link_cut", "ranks": [0, 3], "at_step": 3}
  slow = cut | {"kind": "link_slow", "delay_s": 0.1, "resume_s": 2}
  lost = {"kind": "rank_lost", "ranks": [1], "at_s": 1, "inside": "attention"}
  stuck = lost | {"kind": "rank_stuck", "inside": "experts"}
  assert parse_schedule([cut, slow, lost, stuck], ranks=4) == (
    Fault("link_cut", (0, 3), at_step=3),
    Fault("link_slow", (0, 3), at_step=3, delay_s=0.1, resume_s=2),
    Fault("rank_lost", (1,), at_s=1, inside="attention"),
    Fault("rank_stuck", (1,), at_s=1, inside="experts"),
  )


LINK = {"kind": "link_cut", "ranks": [0, 3]}
LOST = {"kind": "rank_lost", "ranks": [3], "at_step": 20}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "rank_lots"}, "'rank_lots'; choose from rank_lost, rank_leaving"),
    ({"ranks": [8]}, "rank 8 is out of range; 8 ranks have ids 0 to 7"),
    ({"ranks": [-1]}, "rank -1 is not a rank id"),
    ({"ranks": [1.5]}, "rank 1.5 is not a rank id"),
    ({"ranks": [True]}, "rank True is not a rank id"),
    ({"ranks": [3, 3]}, r"\(3, 3\) names a rank twice"),
    ({"ranks": []}, r"ranks is \(\)"),
    ({"ranks": 3}, "ranks is 3"),
    ({"at_s": 1.0}, r"2 triggers \(at_step, at_s\); give exactly one of"),
    ({"at_step": None}, r"0 triggers \(none\); give exactly one of at_step"),
    ({"at_step": -1}, "at_step is -1; needed is an integer from 0"),
    ({"at_step": 2.5}, "at_step is 2.5; needed is an integer from 0"),
    ({"at_step": None, "at_s": -0.1}, "at_s is -0.1; needed is a number from"),
    ({"at_step": None, "at_s": float("nan")}, "at_s is nan"),
    ({"at_step": None, "at_tokens": -5}, "at_tokens is -5"),
    ({"during_recovery": -2}, "during_recovery is -2"),
    ({"phase": "decoding"}, "'decoding'; choose from any, decode, prefill"),
    ({"phase": "decode", "during_recovery": 1}, "no step runs in a recovery"),
    ({"deadline_s": 1.0}, "deadline_s=1.0 belongs to 'rank_leaving' only"),
    ({"kind": "rank_leaving"}, "deadline_s is None; needed is a number above"),
    ({"kind": "rank_leaving", "deadline_s": 0}, "deadline_s is 0; needed"),
    ({"kind": "straggler", "slowdown": 1.0}, "slowdown is 1.0; needed"),
    ({"kind": "rank_stuck", "ranks": []}, r"ranks is \(\)"),
    ({"kind": "rank_stuck", "resume_s": 0}, "resume_s is 0; needed is a numb"),
    ({"kind": "rank_stuck", "resume_s": "1"}, "resume_s is '1'; needed"),
    ({"resume_s": 1.0}, "resume_s=1.0 belongs to 'rank_stuck', 'link_cut', "),
    ({"delay_s": 1.0}, "'rank_lost': delay_s=1.0 belongs to 'link_slow' only"),
    ({"kind": "link_cut"}, r"'link_cut': ranks is \(3,\); needed are the 2"),
    ({"kind": "link_cut", "ranks": [0, 3, 4]}, "needed are the 2 ends"),
    (LINK | {"kind": "link_slow"}, "'link_slow': delay_s is None; needed is a"),
    (LINK | {"kind": "link_slow", "delay_s": 0}, "delay_s is 0; .* above 0.0"),
    (LINK | {"delay_s": 1.0}, "delay_s=1.0 belongs to 'link_slow' only"),
    (LINK | {"resume_s": 0}, "'link_cut': resume_s is 0; needed is a number"),
    (LINK | {"inside": "exchange"}, "inside='exchange' belongs to 'rank_lost'"),
    ({"inside": "expert"}, "'expert'; choose from attention, exchange, exp"),
    ({"inside": ["experts"]}, r"inside is \['experts'\]; choose from attent"),
    ({"kind": "store_lost", "ranks": [], "inside": "exchange"}, "belongs to"),
    ({"inside": "exchange", "during_recovery": 1}, "inside 'exchange' with du"),
    ({"kind": "store_lost"}, r"ranks is \(3,\); it strikes no rank"),
    ({"kind": "supervisor_lost"}, r"'supervisor_lost': ranks is \(3,\)"),
    ({"after_ready": "yes"}, "after_ready is 'yes'; choose from True, False"),
    (
      {"at_stpe": 1},
      "unknown field 'at_stpe'; choose from kind, ranks, at_step",
    ),
  ],
)
def test_bad_faults_are_refused(changes, message):
  with pytest.raises(ValueError, match=f"fault.*{message}"):
    parse_schedule([LOST | changes], ranks=8)


@pytest.mark.parametrize(
  ("items", "message"),
  [
    ("rank_lost_decode", "needed is a list of dicts"),
    (LOST, "needed is a list of dicts"),
    ([7], "fault 0 is 7; needed is a dict"),
    (
      [LOST, {"kind": "rank_lost", "at_step": 1}],
      "fault 1: 'ranks' is missing",
    ),
    ([{"ranks": [1], "at_step": 1}], "fault 0: 'kind' is missing"),
  ],
)
def test_what_is_not_a_list_of_faults_is_refused(items, message):
  with pytest.raises(ValueError, match=message):
    parse_schedule(items, ranks=8)


def test_random_schedules_repeat_and_differ(seed):
  made = random_schedule(
    seed, 8, (5, 50), count=7, phases=("decode", "prefill")
  )
  again = random_schedule(
    seed, 8, (5, 50), count=7, phases=("decode", "prefill")
  )
  assert made == again == check_ranks(made, 8)
  assert made != random_schedule(seed + 1, 8, (5, 50), count=7)
  steps = [fault.at_step for fault in made]
  assert steps == sorted(steps)
  assert all(5 <= step <= 50 for step in steps)
  assert len({fault.ranks for fault in made}) == 7
  assert {fault.phase for fault in made} <= {"decode", "prefill"}


def test_random_schedules_are_the_same_on_every_machine():
  (fault,) = random_schedule(0, 8, (20, 60))
  assert (fault.ranks, fault.at_step) == ((0,), 25)


@pytest.mark.parametrize(
  ("count", "steps", "message"),
  [
    (8, (0, 9), "count is 8; of 8 ranks 0 to 7 can be lost"),
    (-1, (0, 9), "count is -1"),
    (1, (9, 0), r"steps is \(9, 0\); needed is 0 <= first <= last"),
  ],
)
def test_impossible_random_schedules_are_refused(count, steps, message):
  with pytest.raises(ValueError, match=message):
    random_schedule(0, 8, steps, count=count)
