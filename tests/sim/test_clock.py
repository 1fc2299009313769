"""Virtual time: what happens when, and that nobody waits for ever."""

import pytest

from resilient_moe.sim import clock as clock_lib
from resilient_moe.sim.clock import VirtualClock


def test_things_happen_in_the_order_of_their_time_then_as_they_were_made():
  clock, seen = VirtualClock(), []
  for when_s, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "d")):
    clock.at(when_s, lambda n=name: seen.append((n, clock.now())))
  clock.spend(5.0)
  assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]
  assert clock.now() == 5.0
  assert clock.next_s() == 9.0


def test_what_is_late_happens_as_soon_as_it_can():
  clock, seen = VirtualClock(), []
  clock.spend(3.0)
  clock.at(1.0, lambda: seen.append(clock.now()))
  clock.catch_up()
  assert seen == [3.0]


def test_what_happens_may_lead_to_more_at_the_same_moment():
  clock, seen = VirtualClock(), []
  clock.at(1.0, lambda: clock.at(1.0, lambda: seen.append(clock.now())))
  assert clock.step()
  assert seen == [1.0]
  assert not clock.step()


def test_a_sleeper_wakes_for_what_happens_next():
  clock = VirtualClock()
  clock.at(7.0, lambda: None)
  clock.sleep(0.002)
  assert clock.now() == 7.0
  clock.sleep(0.5)
  assert clock.now() == 7.5


def test_nobody_sleeps_for_ever(monkeypatch):
  monkeypatch.setattr(clock_lib, "FOREVER", 3)
  clock = VirtualClock()
  for _ in range(3):
    clock.sleep(1.0)
  with pytest.raises(RuntimeError, match="nothing is on its way at 3.000 s"):
    clock.sleep(1.0)
