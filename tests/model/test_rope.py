"""Frequencies of the rotary embedding, by formulas of their own.

(That they are the reference's too is for `tests/third_party` to say.)
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import ModelConfig
from resilient_moe.model.rope import frequencies, turns, yarn_magnitude

LENGTH, FACTOR = 4096, 8.0
# Pair i of 8 turns 4^-i radians a position, so often within LENGTH positions:
PLAIN = 4.0 ** -np.arange(8)
TURNS = LENGTH * PLAIN / (2 * math.pi)


def scaled(kind: str, **fields) -> np.ndarray:
  config = ModelConfig(
    head_dim=16, rope_theta=4.0**8, rope_scaling=kind, rope_factor=FACTOR,
    rope_length=LENGTH, **fields,
  )  # fmt: skip
  return frequencies(config)


def between(stretch: np.ndarray) -> np.ndarray:
  """0: as it was; 1: divided by the factor."""
  stretch = np.clip(stretch, 0, 1)
  return PLAIN * (1 - stretch + stretch / FACTOR)


def turns_of_pair(i: float) -> float:
  return LENGTH * 4.0**-i / (2 * math.pi)


def test_linear_scaling_stretches_all():
  plain = ModelConfig(head_dim=16, rope_theta=4.0**8)
  np.testing.assert_allclose(frequencies(plain), PLAIN, rtol=1e-6)
  np.testing.assert_allclose(scaled("linear"), PLAIN / FACTOR, rtol=1e-6)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
  low, high = turns_of_pair(5.5), turns_of_pair(2.5)
  got = scaled("llama3", rope_low=low, rope_high=high)
  np.testing.assert_allclose(got[:3], PLAIN[:3], rtol=1e-6)
  np.testing.assert_allclose(got[6:], PLAIN[6:] / FACTOR, rtol=1e-6)
  np.testing.assert_allclose(
    got, between((high - TURNS) / (high - low)), rtol=1e-6
  )


@pytest.mark.parametrize(
  ("first", "last", "truncate", "bounds"),
  [
    (2.5, 5.5, True, (2, 6)),
    (2.5, 5.5, False, (2.5, 5.5)),
    (-1.5, 5.5, True, (0, 6)),  # from the first pair on
    (2.5, 20.5, True, (2, 15)),  # to the width, not to the pairs
    (3.5, 3.5, False, (3.5, 3.501)),  # a step
  ],
)
def test_yarn_stretches_by_a_ramp_over_the_pairs(first, last, truncate, bounds):
  got = scaled(
    "yarn", rope_fast=turns_of_pair(first), rope_slow=turns_of_pair(last),
    rope_truncate=truncate,
  )  # fmt: skip
  low, high = bounds
  want = between((np.arange(8) - low) / (high - low))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_magnitudes_multiply_cosine_and_sine():
  plain = ModelConfig(head_dim=16)
  wide = ModelConfig(head_dim=16, rope_magnitude=1.5)
  at = jnp.arange(3, dtype=jnp.int32)
  for one, more in zip(turns(at, plain), turns(at, wide), strict=True):
    np.testing.assert_allclose(more, 1.5 * np.asarray(one), rtol=1e-6)
  assert yarn_magnitude(math.e) == pytest.approx(1.1)
  assert yarn_magnitude(math.e, 2.0) == pytest.approx(1.2)
  assert yarn_magnitude(1.0) == yarn_magnitude(0.5) == 1.0
