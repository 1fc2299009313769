import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import rows
from tests.model.harness import fast_jit


@pytest.mark.parametrize("n", [1, 2, 5, 31])
def test_pairwise_sum_is_the_sum(n, rng):
  x = rng.standard_normal((4, n)).astype(np.float32)
  got = fast_jit(rows.pairwise_sum)(x)
  np.testing.assert_allclose(got, x.astype(np.float64).sum(-1), atol=1e-5)


def test_pairwise_sum_adds_halves():
  """The order is part of the contract: it is what keeps the bits."""
  x = np.array([1e8, 1.0, -1e8, 1.0, 0.5], np.float32)
  # (1e8 + -1e8), (1 + 1), 0.5 -> (0 + 2), 0.5 -> 2.5; from left to right 1.5
  assert float(rows.pairwise_sum(jnp.asarray(x))) == 2.5


def test_rms_norm_is_the_formula(rng):
  x = rng.standard_normal((5, 48)).astype(np.float32) * 3
  scale = rng.standard_normal(48).astype(np.float32)
  wide = x.astype(np.float64)
  want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * scale
  got = fast_jit(rows.rms_norm)(x, scale, 1e-3)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_softmax_is_the_formula_and_bears_masks(rng):
  x = rng.standard_normal((5, 7)).astype(np.float32) * 40
  x[:, 2] = -np.inf
  e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
  got = np.asarray(rows.softmax(jnp.asarray(x)))
  np.testing.assert_allclose(got, e / e.sum(-1, keepdims=True), atol=1e-6)
  assert (got[:, 2] == 0).all()


def layer(w, r):
  """What a block of rows goes through: norm, product, nonlinearity."""
  x, shift = r
  h = rows.rms_norm(x, w["norm"], 1e-6)
  return jnp.tanh(h @ w["matrix"]) + shift[:, None], h


@functools.partial(fast_jit, static_argnames="block")
def run(w, r, block=8):
  return rows.rowwise(layer, w, r, block)


def inputs(rng, n: int, d: int = 48, f: int = 40):
  w = {"norm": np.ones(d), "matrix": rng.standard_normal((d, f))}
  r = (rng.standard_normal((n, d)), rng.standard_normal(n))
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (w, r))


# Which kernel multiplies one row, few or many depends on the matrix too.
@pytest.mark.parametrize(("block", "d", "f"), [(8, 48, 40), (32, 256, 512)])
def test_rowwise_gives_a_row_the_same_bits_in_any_number_of_rows(
  block, d, f, rng
):
  w, r = inputs(rng, 70, d, f)
  whole = run(w, r, block=block)
  for n in (1, 7, 33):
    part = run(w, jax.tree.map(lambda x, n=n: x[:n], r), block=block)
    for a, b in zip(part, whole, strict=True):
      np.testing.assert_array_equal(a, b[:n], f"{n} rows")


def test_rowwise_is_the_function(rng):
  w, r = inputs(rng, 19)
  for block in (0, 8):
    got = run(w, r, block=block)
    for a, b in zip(got, fast_jit(layer)(w, r), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)


def test_rowwise_gives_logical_ranks_the_bits_of_one_rank(rng):
  """Without care, `vmap` would merge the ranks' rows into one product."""
  w, r = inputs(rng, 60)
  stacked = jax.tree.map(lambda x: x.reshape(5, 12, *x.shape[1:]), r)
  f = lambda r: rows.rowwise(layer, w, r, 32)
  merged = fast_jit(jax.vmap(f))(stacked)
  for i in range(5):
    alone = run(w, jax.tree.map(lambda x, i=i: x[i], stacked), block=32)
    for a, b in zip(merged, alone, strict=True):
      np.testing.assert_array_equal(a[i], b)
