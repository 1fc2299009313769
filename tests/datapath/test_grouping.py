"""Grouping by expert rank loses nothing, and sends no more than it says."""

import numpy as np
import pytest

from resilient_moe.datapath import grouping
from resilient_moe.datapath.routes import ExpertRoutes
from tests.datapath import fake
from tests.datapath.fake import BATCH, DOUBLE, LAYERS, E, Scene


def draw(rng, n=9, k=3, width=5):
  h = rng.standard_normal((n, width)).astype(np.float32)
  experts = np.stack([rng.permutation(E)[:k] for _ in range(n)])
  return h, experts.astype(np.int32), rng.random(n) < 0.7


def spread_table(rng, ranks=4, copies=2):
  """Every expert on `copies` random ranks."""
  return fake.routes(
    0,
    {
      e: [(int(r), e) for r in rng.permutation(ranks)[:copies]]
      for e in range(E)
    },
  )


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_every_live_assignment_is_sent_once_with_its_row(rng, dedup, copies):
  for _ in range(20):
    h, experts, live = draw(rng)
    table = spread_table(rng, copies=copies)
    grouped = grouping.group(
      h, experts, live, ExpertRoutes(table), 5, dedup, layer=7
    )
    slots, seen = fake.held(table), []
    assert list(grouped.parcels) == sorted(grouped.where)
    for rank, parcel in grouped.parcels.items():
      where = grouped.where[rank]
      assert parcel.layer == 7
      assert parcel.token.dtype == parcel.slot.dtype == np.int32
      assert where.dtype == np.int64
      seen += where.tolist()
      np.testing.assert_array_equal(parcel.rows[parcel.token], h[where // 3])
      wanted = [slots[rank, s] for s in parcel.slot.tolist()]
      assert wanted == experts.reshape(-1)[where].tolist()
    assert sorted(seen) == grouping.assignments(live, 3).tolist()
    assert set(np.array(seen, int) // 3) == set(np.flatnonzero(live))
    assert grouped.missing == []
    assert grouped.left.size == 0


def test_a_token_goes_once_to_a_rank_or_once_for_each_expert(rng):
  h, experts, live = draw(rng, n=12, k=4)
  routes = ExpertRoutes(spread_table(rng, ranks=3, copies=1))
  once = grouping.group(h, experts, live, routes, 0)
  each = grouping.group(h, experts, live, routes, 0, dedup=False)
  for rank, parcel in once.parcels.items():
    tokens = np.unique(once.where[rank] // 4)
    np.testing.assert_array_equal(parcel.rows, h[tokens])
    assert len(each.parcels[rank].rows) == len(once.where[rank])
  sent, returned = np.sum(
    [grouping.traffic_bytes(p) for p in each.parcels.values()], axis=0
  )
  # Tarragon's V = 2 k D S a token counts the way there and back.
  assert sent + returned == 2 * 4 * h.shape[1] * 4 * live.sum()
  fewer, same = np.sum(
    [grouping.traffic_bytes(p) for p in once.parcels.values()], axis=0
  )
  assert fewer < sent
  assert same == returned


def test_tokens_take_turns_on_the_copies():
  routes = ExpertRoutes(fake.routes(0, {0: [(0, 0), (1, 0)]}))
  h = np.zeros((4, 2), np.float32)
  experts, live = np.zeros((4, 1), np.int32), np.ones(4, bool)
  for place in (0, 1):
    grouped = grouping.group(h, experts, live, routes, place)
    assert grouped.where[place].tolist() == [0, 2]
    assert grouped.where[1 - place].tolist() == [1, 3]


def test_what_nobody_serves_is_named():
  routes = ExpertRoutes(fake.routes(0, {0: [(0, 0)], 1: [], 2: []}))
  h = np.zeros((3, 2), np.float32)
  experts = np.array([[2, 0], [1, 2], [0, 1]], np.int32)
  live = np.array([True, True, False])
  grouped = grouping.group(h, experts, live, routes, 0)
  assert grouped.missing == [1, 2]
  assert grouped.left.tolist() == [0, 2, 3]
  assert grouped.where[0].tolist() == [1]
  nothing = grouping.group(h, experts, np.zeros(3, bool), routes, 0)
  assert nothing.parcels == {}
  assert nothing.missing == []


def test_a_parcel_keeps_its_rows_when_the_caller_reuses_h(rng):
  h, experts, live = draw(rng)
  grouped = grouping.group(h, experts, live, ExpertRoutes(spread_table(rng)), 0)
  before = {r: p.rows.copy() for r, p in grouped.parcels.items()}
  h[:] = 0
  for rank, parcel in grouped.parcels.items():
    np.testing.assert_array_equal(parcel.rows, before[rank])


def test_results_land_where_they_belong():
  y = np.full((4, 2), 9, np.float32)
  grouping.scatter(y, np.array([3, 1]), np.array([[1, 2], [3, 4]]))
  assert y.tolist() == [[9, 9], [3, 4], [9, 9], [1, 2]]


# Under an exchange.


@pytest.mark.parametrize("dedup", [True, False])
def test_bytes_are_those_of_the_papers_without_dedup(dedup):
  h, experts, live = BATCH
  one_rank = {e: [(0, e)] for e in range(E)}
  scene = Scene(fake.routes(0, one_rank), dedup=dedup)
  scene.check_step()
  half = LAYERS * live.sum() * experts.shape[1] * h.shape[1] * h.itemsize
  assert scene.exchange.sent_bytes == (half // 2 if dedup else half)
  assert scene.exchange.returned_bytes == half


def test_places_take_different_copies():
  h, live = np.ones((1, 4), np.float32), np.ones(1, bool)
  for place, (rank, _) in enumerate(DOUBLE[0]):
    scene = Scene(fake.routes(0, DOUBLE), place=place)
    scene.check_run(0, (h, np.zeros((1, 1), np.int32), live))
    assert [sent[0] for sent in scene.links.log] == [rank]
