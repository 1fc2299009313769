"""An EW's batch: one layer, replays first, never a barrier over all AWs."""

import numpy as np
import pytest

from resilient_moe.datapath.gather import (
  GatherLimits,
  Waiting,
  merge,
  next_deadline,
  split,
  take,
)
from resilient_moe.datapath.parcels import Parcel

AT_ONCE = GatherLimits()
TOGETHER = GatherLimits(min_rows=4, wait_s=2.0)


def waiting(
  aw: int, layer: int, since_s: float, urgent: bool = False, n: int = 1
) -> Waiting:
  index = np.zeros(n, np.int32)
  parcel = Parcel(layer, np.zeros((n, 2), np.float32), index, index)
  return Waiting(aw, int(since_s), parcel, since_s, urgent)


def test_by_default_the_oldest_layer_starts_at_once_with_whatever_is_there():
  late, other, first = waiting(2, 3, 9), waiting(0, 5, 8), waiting(1, 3, 7)
  batch = take([late, other, first], {0, 1, 2, 3}, 9.0, AT_ONCE)
  assert batch == [first, late]
  assert take([], {0}, 9.0, AT_ONCE) == []


def test_replays_go_first_and_wait_for_nobody():
  old, replay = waiting(0, 3, 1, n=2), waiting(1, 5, 7, urgent=True)
  later, same = waiting(2, 5, 8, urgent=True), waiting(2, 5, 6)
  batch = take([old, same, later, replay], {0, 1, 2}, 8.0, TOGETHER)
  assert batch == [replay, later, same]


def test_all_live_aws_are_waited_for_and_no_dead_one():
  some = [waiting(0, 3, 1), waiting(1, 3, 2)]
  assert take(some, {0, 1, 2}, 99.0, TOGETHER) == []
  assert take(some, {0, 1}, 2.0, TOGETHER) == some
  # Another layer's parcel is none of this one.
  assert take([*some, waiting(2, 4, 3)], {0, 1, 2}, 3.0, TOGETHER) == []


def test_a_dead_aws_tokens_are_left_out():
  dead, alive = waiting(0, 3, 1), waiting(1, 4, 2)
  assert take([dead, alive], {1}, 2.0, TOGETHER) == [alive]
  assert take([dead], set(), 2.0, AT_ONCE) == []


def test_enough_rows_start_without_the_others_once_the_oldest_has_waited():
  few, enough = [waiting(0, 3, 1, n=3)], [waiting(0, 3, 1, n=4)]
  assert take(few, {0, 1}, 99.0, TOGETHER) == []
  assert take(enough, {0, 1}, 2.9, TOGETHER) == []
  assert take(enough, {0, 1}, 3.0, TOGETHER) == enough


def test_the_deadline_is_when_take_would_give_a_batch():
  some = [waiting(0, 3, 1, n=4)]
  assert next_deadline(some, {0, 1}, TOGETHER) == 3.0
  assert next_deadline(some, {0}, TOGETHER) == 1.0
  assert next_deadline([waiting(0, 3, 1)], {0, 1}, TOGETHER) is None
  assert next_deadline([], {0}, TOGETHER) is None


def test_merged_and_split_again_every_assignment_keeps_its_row(rng):
  parcels = [
    Parcel(
      3,
      rng.random((n, 5), np.float32),
      rng.integers(0, n, m, np.int32) if m else np.zeros(0, np.int32),
      rng.integers(0, 9, m, np.int32),
    )
    for n, m in [(3, 6), (1, 0), (4, 2)]
  ]
  rows, token, slot, splits = merge(parcels)
  assert token.dtype == slot.dtype == np.int32
  parts = split(rows[token] * slot[:, None], splits)
  for p, part in zip(parcels, parts, strict=True):
    np.testing.assert_array_equal(part, p.rows[p.token] * p.slot[:, None])


def test_one_parcel_is_merged_without_a_copy():
  parcel = waiting(0, 3, 1).parcel
  rows, token, slot, splits = merge([parcel])
  assert rows is parcel.rows
  assert split(rows, splits)[0].base is rows


def test_parcels_that_differ_in_width_are_refused_by_name():
  one = waiting(0, 3, 1).parcel
  with pytest.raises(ValueError, match="differ in .*width"):
    merge([one, one._replace(rows=np.zeros((1, 3), np.float32))])


@pytest.mark.parametrize(
  ("kwargs", "name"),
  [
    ({"min_rows": 0}, "min_rows is 0"),
    ({"wait_s": -1.0}, "wait_s is -1"),
    ({"wait_s": float("inf")}, "wait_s is inf"),
    ({"wait_s": float("nan")}, "wait_s is nan"),
  ],
)
def test_limits_name_what_is_wrong(kwargs, name):
  with pytest.raises(ValueError, match=name):
    GatherLimits(**kwargs)
