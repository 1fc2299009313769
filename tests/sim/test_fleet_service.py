"""Closed-form service against sums done by hand."""

import numpy as np
import pytest

from resilient_moe.recovery import bare_view, load
from resilient_moe.recovery.start import start
from resilient_moe.sim import fleet_service
from resilient_moe.sim.arrivals import Load

RANKS = 4
# Prompts of 2 chunks of 100; 50 new tokens.
REQUESTS = Load("by hand", np.ones(1), np.array([200]), np.array([50]))


class Linear:
  """A step takes 10 ms, 1 ms a row and 0.1 ms a prompt token of the busiest."""

  def step_s(self, view, batch):
    del view
    rows, chunk = batch.rows.max(), batch.chunk.max()
    return 0.01 + 0.001 * rows + 0.0001 * chunk


def view():
  return start(load("none"), bare_view(RANKS, 8, rows_per_rank=4))


def test_a_step_waits_for_whoever_prefills():
  ranks = view().mesh
  mean_s, filling_s = fleet_service.step_of(
    Linear(), view(), REQUESTS, ranks, 5.0, 100
  )
  mine = 5 / 50 * 2  # of a rank's steps have a chunk
  some = 1 - (1 - mine) ** RANKS
  assert filling_s == pytest.approx(0.01 + 0.005 + 0.01)
  assert mean_s == pytest.approx(0.015 + some * 0.01)


def test_rows_that_prefill_do_not_decode():
  assert fleet_service.prompt_steps(REQUESTS, 100) == 2
  assert fleet_service.decoding_rows(REQUESTS, 13, 100) == pytest.approx(12.5)
  # No more than one prompt in two steps: 25 rows keep a rank's chunk busy.
  assert fleet_service.decoding_rows(REQUESTS, 100, 100) == 25
  assert fleet_service.useful_rows(REQUESTS, 100) == 26


def test_capacity_is_rows_over_what_their_tokens_take():
  found = fleet_service.service(Linear(), view(), REQUESTS, 13, 100)
  step_s = found.step_at(12.5)
  assert found.capacity == pytest.approx(RANKS * 12.5 / (50 * step_s))
  assert found.running(found.capacity) == pytest.approx(12.5)
  assert found.running(1e9) == pytest.approx(12.5)
  half = found.running(found.capacity / 2)
  assert 0 < half < 12.5 / 2  # fewer rows are faster each
  assert found.slowed(2.0).capacity == pytest.approx(found.capacity / 2)
  assert found.first_token_s(12.5, 2) == pytest.approx(2.5 * 0.0325)


def test_streaming_checkpoints_takes_its_time():
  plain = fleet_service.service(Linear(), view(), REQUESTS, 13, 100)
  kept = fleet_service.service(Linear(), view(), REQUESTS, 13, 100, 0.001)
  assert kept.step_at(12.5) == pytest.approx(plain.step_at(12.5) + 0.0125)


def test_no_rows_serve_nothing():
  found = fleet_service.service(Linear(), view(), REQUESTS, 0, 100)
  assert (found.capacity, found.running(1.0)) == (0.0, 0.0)


def test_rows_within_an_objective():
  def rows(limit_s):
    return fleet_service.rows_within(
      Linear(), view(), REQUESTS, 26, 100, limit_s
    )

  assert rows(1.0) == 26
  assert rows(0.005) == 0
  some = rows(0.025)
  assert 0 < some < 26
