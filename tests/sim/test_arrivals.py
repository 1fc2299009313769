"""Requests that are drawn are like those that were seen."""

import numpy as np
import pytest

from resilient_moe.sim import arrivals
from third_party import azure_traces


@pytest.mark.parametrize("name", ["code", "conv"])
def test_a_drawn_trace_has_the_statistics_of_the_shipped_ones(name, rng):
  of = arrivals.statistics(name)
  drawn = arrivals.generate(of, 16 * 3600, rng)
  records = [
    azure_traces.Record(*map(float, one))
    for one in zip(drawn.arrival_s, drawn.context, drawn.generated, strict=True)
  ]
  found = azure_traces.statistics(records)
  loose = {"minute_lag1": 0.15, "rank_correlation": 0.03}
  for key, limit in loose.items():
    assert found[key] == pytest.approx(of[key], abs=limit), key
  for key in ("rate_per_s", "context_mean", "generated_mean", "second_fano"):
    assert found[key] == pytest.approx(of[key], rel=0.15), key
  for key in ("minute_quantiles", "context_quantiles", "generated_quantiles"):
    seen, want = np.array(found[key]), np.array(of[key])
    middle = (want[:, 0] >= 0.1) & (want[:, 0] <= 0.95)
    scale = want[middle, 1].max()
    np.testing.assert_allclose(
      seen[middle, 1], want[middle, 1], rtol=0.12, atol=0.06 * scale
    )


def test_rates_are_relative_to_their_mean(rng):
  load = arrivals.generated_load("conv", 20_000, rng)
  assert load.relative.mean() == pytest.approx(1, rel=0.05)
  assert load.relative.min() >= 0


def test_long_requests_are_caught_running_more_often():
  load = arrivals.Load(
    "two", np.ones(1), np.array([10, 10]), np.array([1, 99])
  )
  assert load.generated_below(50) == (pytest.approx(0.01), pytest.approx(0.01))
  assert load.running_context == pytest.approx(
    (1 * 10.5 + 99 * 59.5) / 100
  )


def test_a_trace_is_its_whole_minutes():
  at = np.array([0.0, 10.0, 70.0, 130.0])
  load = arrivals.trace_load("t", at, np.array([5] * 4), np.array([0] * 4))
  np.testing.assert_allclose(load.relative, [4 / 3, 2 / 3])
  assert load.generated.min() == 1


def test_bad_names_and_rates_are_named(rng):
  with pytest.raises(ValueError, match="unknown trace 'x'; choices: code"):
    arrivals.statistics("x")
  with pytest.raises(ValueError, match="0.0 requests a second"):
    arrivals.generate(arrivals.statistics("conv"), 60, rng, rate_per_s=0.0)
  assert "CC-BY" in arrivals.attribution()
