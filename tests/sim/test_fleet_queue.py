"""The fluid queue against small steps, and against itself without a cache."""

import numpy as np
import pytest

from resilient_moe.sim.fleet_queue import Demand, Healthy, Queue


def demand(rates, slo_s=2.0, patience_s=120.0, limit=1e9):
  return Demand(np.array(rates, float), slo_s, patience_s, limit)


def small_steps(rates, capacity, seconds, slo_s, limit, dt=0.01):
  """Requests one by one in a list, in steps of `dt`."""
  queue, started, in_time, refused, owed = [], 0.0, 0.0, 0.0, 0.0
  for i in range(round(seconds / dt)):
    t = i * dt
    n = rates[int(t // 60) % len(rates)] * dt
    let_in = min(n, max(limit - sum(x for _, x in queue), 0) + capacity(t) * dt)
    refused += n - let_in
    queue.append((t, let_in))
    owed = capacity(t) * dt
    while queue and owed > 1e-12:
      came, amount = queue.pop(0)
      taken = min(amount, owed)
      owed -= taken
      started += taken
      in_time += taken * (t - came <= slo_s)
      if amount > taken:
        queue.insert(0, (came, amount - taken))
  return started, in_time, refused


@pytest.mark.parametrize("limit", [1e9, 25.0])
def test_counts_are_those_of_small_steps(limit):
  rates, capacity = [4.0, 7.0, 3.0], 5.0
  stops = (30.0, 42.0)  # nobody starts

  def rate(t):
    return 0.0 if stops[0] <= t < stops[1] else capacity

  queue = Queue(demand(rates, limit=limit), capacity)
  queue.advance(stops[0])
  queue.set(0.0)
  queue.advance(stops[1])
  queue.set(capacity)
  queue.advance(180.0)
  counts = queue.finish()
  started, in_time, refused = small_steps(rates, rate, 180.0, 2.0, limit)
  assert counts.arrived == pytest.approx(60 * sum(rates))
  assert counts.started == pytest.approx(started, rel=1e-3)
  assert counts.in_time == pytest.approx(in_time, rel=0.01)
  assert counts.refused == pytest.approx(refused, abs=0.2)
  assert counts.started + counts.refused + queue.waiting == pytest.approx(
    counts.arrived
  )
  assert counts.at_once + counts.waits[-1] == pytest.approx(counts.started)


def test_waits_after_an_outage_are_known_by_hand():
  # 10 s of 2 a second wait; then 4 a second start: the queue is empty 20 s
  # after the outage began, and the first has waited for 10 s.
  queue = Queue(demand([2.0]), 4.0)
  queue.advance(5.0)
  queue.set(0.0)
  queue.advance(15.0)
  queue.set(4.0)
  queue.advance(24.9)
  assert not queue.calm
  queue.advance(60.0)
  assert queue.calm
  counts = queue.finish()
  assert counts.started - counts.at_once == pytest.approx(40.0, abs=0.1)
  assert counts.wait_s(1.0) == pytest.approx(10.0, rel=0.13)  # a bin
  # With a second or three of their own, each as likely.
  own_s = np.array([1.0, 3.0])
  assert counts.wait_s(1.0, own_s) == pytest.approx(13.0, rel=0.13)


def test_clients_leave_a_long_outage():
  queue = Queue(demand([2.0], patience_s=30.0, limit=1000.0), 4.0)
  queue.set(0.0)
  queue.advance(600.0)
  queue.set(4.0)
  assert queue.waiting == pytest.approx(60.0)
  queue.advance(900.0)
  counts = queue.finish()
  assert counts.refused == pytest.approx(1200.0 - 60.0)
  assert counts.started == pytest.approx(counts.arrived - counts.refused)


def test_slow_tokens_are_not_in_time():
  queue = Queue(demand([2.0]), 4.0)
  queue.set(4.0, good=False)
  queue.advance(60.0)
  queue.set(4.0)
  queue.advance(90.0)
  counts = queue.finish()
  assert (counts.started, counts.in_time) == (180.0, 60.0)


def test_who_waits_and_then_has_slow_tokens_is_not_in_time():
  queue = Queue(demand([2.0], slo_s=100.0), 1.0)
  queue.set(1.0, good=False)
  queue.advance(60.0)
  queue.set(1.0)
  queue.advance(120.0)
  counts = queue.finish()
  assert counts.started == pytest.approx(120.0)
  assert counts.in_time == pytest.approx(60.0)


def test_requests_return():
  queue = Queue(demand([2.0]), 4.0)
  queue.advance(30.0)
  queue.take_back(10)
  queue.fail(5)
  queue.advance(120.0)
  counts = queue.finish()
  assert counts.arrived == pytest.approx(245.0)
  assert counts.started == pytest.approx(245.0)
  # The five failed; of 15 that wait, 7 are behind 8, which take 2 s; and so
  # do those who come until no more than 8 wait, 3.5 s later.
  assert counts.in_time == pytest.approx(245.0 - 5 - 7 - 7)


def test_a_month_of_health_is_computed_once(rng):
  """With and without what healthy groups share, counts are equal."""
  rates = rng.uniform(0.2, 1.3, 50)
  asked = demand(rates, limit=40.0)
  healthy = Healthy(asked, 1.0, 2000)
  queues = [Queue(asked, 1.0, healthy), Queue(asked, 1.0)]
  for queue in queues:
    for start in (1000.0, 50_000.0, 90_017.0):
      queue.advance(start)
      queue.set(0.0)
      queue.advance(start + 45.0)
      queue.set(0.9)
      queue.advance(start + 4000.0)
      queue.set(1.0)
    queue.advance(120_000.0)
  fast, slow = (queue.finish() for queue in queues)
  for name in ("arrived", "refused", "started", "in_time", "at_once"):
    assert getattr(fast, name) == pytest.approx(getattr(slow, name)), name
  np.testing.assert_allclose(fast.waits, slow.waits, rtol=1e-6, atol=1e-6)
  alone = Queue(asked, 1.0, healthy)
  alone.advance(120_000.0)
  assert alone.finish().started == pytest.approx(healthy.total.started)


def test_a_group_is_not_healthy_because_nobody_waits():
  """Others still have a queue that this one's clients have left."""
  asked = demand([0.5, 3.0, 0.0, 0.0, 0.0, 0.5], patience_s=30.0)
  healthy = Healthy(asked, 1.0, 12)
  queues = [Queue(asked, 1.0, healthy), Queue(asked, 1.0)]
  for queue in queues:
    queue.advance(60.0)
    queue.set(0.0)
    queue.advance(180.0)
    queue.set(1.0)
    assert queue.calm
    assert not healthy.calm[3]
    queue.advance(660.0)
  fast, slow = (queue.finish() for queue in queues)
  assert fast.started == pytest.approx(slow.started)
