"""Rates and what is drawn from them."""

import dataclasses

import numpy as np
import pytest

from resilient_moe.sim import failure_rates
from resilient_moe.sim.failure_rates import RATES, Repair, failure_model
from resilient_moe.sim.fleet_faults import Layout, draw


def test_rates_are_the_published_ones():
  hours = {
    name: 24 / (rate.per_node_day * 1024 / 8)
    for name, rate in RATES.items()
    if name != "never"
  }
  assert hours["rsc1"] == pytest.approx(28.8, abs=0.1)
  assert hours["rsc_mttf"] == pytest.approx(7.9)
  assert RATES["llama3"].per_node_day == pytest.approx(3.79e-3, rel=1e-2)
  assert all(rate.source for rate in RATES.values())


def test_causes_add_up_to_the_published_total():
  assert sum(n for _, n in failure_rates.LLAMA3_CAUSES.values()) == 419
  fractions = failure_rates.llama3_fractions()
  assert sum(fractions.values()) == pytest.approx(1)
  assert fractions["device"] > 0.6


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"rate": "often"}, "unknown rate 'often'; choices: rsc1"),
    ({"fractions": {"gpu": 1.0}}, "unknown domain 'gpu'; choices: device"),
    ({"fractions": {"host": 0.5}}, "add up to 0.5, not 1"),
    ({"multiplier": -1}, "multiplier=-1"),
  ],
)
def test_bad_models_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    failure_model(**arguments)


def test_as_many_failures_as_the_rate_says(rng):
  layout = Layout(groups=160, ranks=64)
  days, model = 300.0, failure_model("rsc1")
  trace = draw(layout, model, days, rng)
  expected = model.expected_failures(layout.devices, days)
  assert expected == pytest.approx(0.0065 * 1280 * 300)
  assert trace.failures == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
  ("domain", "groups", "devices"),
  [("device", 1, 1), ("process", 1, 1), ("host", 1, 8), ("rack", 4, 32)],
)
def test_a_domain_goes_as_a_whole(rng, domain, groups, devices):
  layout = Layout(groups=8, ranks=8)
  model = failure_model("rsc1", {domain: 1.0}, multiplier=100)
  trace = draw(layout, model, 2.0, rng)
  first = min(s.t_s for strikes in trace.strikes.values() for s in strikes)
  struck = {
    group: strike
    for group, strikes in trace.strikes.items()
    for strike in strikes
    if strike.t_s == first
  }
  assert len(struck) == groups
  assert sum(len(strike.ranks) for strike in struck.values()) == devices


def test_who_is_away_does_not_break_again(rng):
  repair = Repair(pool_fraction=0.0, median_s=1e9, sigma=0.0)
  model = failure_model("rsc1", {"device": 1.0}, repair, multiplier=1000)
  trace = draw(Layout(groups=2, ranks=8), model, 30.0, rng)
  for strikes in trace.strikes.values():
    ranks = [rank for strike in strikes for rank in strike.ranks]
    assert len(ranks) == len(set(ranks)) <= 8


def test_the_pool_brings_devices_back_sooner_until_it_is_empty(seed):
  def back(pool_fraction):
    repair = Repair(pool_fraction=pool_fraction, swap_s=60.0, sigma=0.0)
    model = failure_model("rsc1", {"device": 1.0}, repair, multiplier=20)
    rng = np.random.default_rng(seed)
    trace = draw(Layout(groups=4, ranks=64), model, 5.0, rng)
    waits = [
      strike.back_s[0] - strike.t_s
      for strikes in trace.strikes.values()
      for strike in strikes
    ]
    return sorted(waits)

  everyone, nobody = back(1.0), back(0.0)
  assert everyone[-1] == pytest.approx(60.0)
  assert nobody[0] == pytest.approx(60.0 + failure_rates.DAY_S, rel=0.5)
  assert nobody[0] > 3600


def test_the_draw_is_its_seed(seed):
  layout, model = Layout(groups=16, ranks=64), failure_model("rsc1")
  traces = [
    draw(layout, model, 30.0, np.random.default_rng(seed)) for _ in range(2)
  ]
  other = draw(layout, model, 30.0, np.random.default_rng(seed + 1))
  assert dataclasses.asdict(traces[0]) == dataclasses.asdict(traces[1])
  assert dataclasses.asdict(traces[0]) != dataclasses.asdict(other)
