import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import ModelConfig, StepOptions
from resilient_moe.model.attention import attend, attend_plain
from resilient_moe.model.projections import queries_and_kv
from resilient_moe.model.rope import rope
from tests.model.harness import fast_jit

HEADS, KV_HEADS, D = 4, 2, 8


def dense(q, kv, at):
  """Attention of one sequence in float64: q [Q, H, d], kv [T, 2K, d]."""
  q, kv = q.astype(np.float64), kv.astype(np.float64)
  k, v = np.split(kv, 2, axis=1)
  out = np.zeros_like(q)
  for i, position in enumerate(at):
    for h in range(q.shape[1]):
      g = h // (q.shape[1] // k.shape[1])
      scores = k[: position + 1, g] @ q[i, h]
      p = np.exp(scores - scores.max())
      out[i, h] = (p / p.sum()) @ v[: position + 1, g]
  return out


def draw(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


@functools.partial(fast_jit, static_argnames="kv_block")
def run(q, kv_new, start, length, cache, kv_block):
  def block(j):
    return jax.lax.dynamic_slice_in_dim(cache, j * kv_block, kv_block, 2)

  options = StepOptions(kv_block=kv_block)
  return attend(q, kv_new, start, length, block, options)


def cached(kv, starts, size, fill=1e4):
  """[G, 2K, T, d]: the true keys before each start, rubbish behind."""
  shape = (len(starts), kv.shape[2], size, kv.shape[3])
  cache = np.full(shape, fill, np.float32)
  for g, start in enumerate(starts):
    cache[g, :, :start] = np.swapaxes(kv[g, :start], 0, 1)
  return cache


# queries, starts (none on a block's edge but 0 and 16), block
SHAPES = {
  "decode": (1, (0, 5, 15, 16, 47), 16),
  "chunk": (12, (0, 5, 16, 37), 16),
  "chunk-wider-than-block": (20, (0, 3, 8, 29), 8),
  "several-parts": (40, (0, 7), 16),  # more than 32 rows of one product
}


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_a_cache_is_dense_attention(shape, rng):
  n_q, starts, size = SHAPES[shape]
  g, total = len(starts), 64
  kv = draw(rng, g, total, 2 * KV_HEADS, D)
  q = draw(rng, g, n_q, HEADS, D)
  start = np.array(starts, np.int32)
  new = np.stack([kv[i, s : s + n_q] for i, s in enumerate(starts)])
  length = np.full(g, n_q, np.int32)
  out = run(q, new, start, length, cached(kv, starts, total), size)
  for i, s in enumerate(starts):
    want = dense(q[i], kv[i], np.arange(s, s + n_q))
    np.testing.assert_allclose(out[i], want, atol=2e-5)


def test_padded_queries_and_idle_rows_change_no_bit(rng):
  n_q, starts = 12, (0, 5, 21)
  kv = draw(rng, 3, 64, 2 * KV_HEADS, D)
  q = draw(rng, 3, n_q, HEADS, D)
  start, cache = np.array(starts, np.int32), cached(kv, starts, 64)
  new = np.stack([kv[i, s : s + n_q] for i, s in enumerate(starts)])
  full = run(q, new, start, np.full(3, n_q, np.int32), cache, 16)
  length = np.array([0, 7, 12], np.int32)
  padded = [new.copy(), q.copy()]
  for x in padded:
    x[0], x[1, 7:] = 1e3, -1e3
  out = run(padded[1], padded[0], start, length, cache, 16)
  np.testing.assert_array_equal(out[1, :7], full[1, :7])
  np.testing.assert_array_equal(out[2], full[2])
  assert np.isfinite(out).all()


@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
def test_decoded_and_prefilled_tokens_have_equal_bits(kv_heads, rng):
  """The same positions as one chunk, as two, and one by one."""
  n, d = 24, 64
  kv, q = draw(rng, 1, n, 2 * kv_heads, d), draw(rng, 1, n, HEADS, d)

  def part(first, stop):
    start = np.array([first], np.int32)
    length = np.array([stop - first], np.int32)
    return run(
      q[:, first:stop], kv[:, first:stop], start, length,
      cached(kv, (first,), 64), 16,
    )[0]  # fmt: skip

  whole = part(0, n)
  np.testing.assert_array_equal(part(9, n), whole[9:])
  for at in (0, 1, 15, 16, 23):
    np.testing.assert_array_equal(part(at, at + 1)[0], whole[at])


def test_without_a_cache_it_is_plain_attention(rng):
  q, kv = draw(rng, 2, 21, HEADS, D), draw(rng, 2, 21, 2 * KV_HEADS, D)
  zero, n = np.zeros(2, np.int32), np.full(2, 21, np.int32)
  blocks = fast_jit(
    lambda: attend(q, kv, zero, n, None, StepOptions(kv_block=8))
  )()
  plain = fast_jit(attend_plain)(q, kv)
  np.testing.assert_allclose(blocks, plain, atol=1e-5)
  for i in range(2):
    want = dense(q[i], kv[i], np.arange(21))
    np.testing.assert_allclose(plain[i], want, atol=1e-5)


def test_rope_rotates_halves(rng):
  x, at = draw(rng, 6, 3, D), np.array([0, 1, 2, 9, 100, 1999], np.int32)
  half = D // 2
  angle = at[:, None] * 100.0 ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
  want = np.concatenate([turned.real, turned.imag], axis=-1)
  config = ModelConfig(head_dim=D, rope_theta=100.0)
  got = fast_jit(lambda x: rope(x, jnp.asarray(at), config))(x)
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_queries_are_scaled_and_values_left(rng):
  c = ModelConfig(n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=D)
  h = draw(rng, 5, 16)
  w = {"qkv": draw(rng, 16, (HEADS + 2 * KV_HEADS) * D)}
  at = jnp.arange(5, dtype=jnp.int32)
  q, kv = fast_jit(lambda h: queries_and_kv(c, w, h, at))(h)
  heads = (h @ w["qkv"]).reshape(5, -1, D)
  turned = fast_jit(lambda x: rope(x, at, c))(heads)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(q, turned[:, :HEADS] / np.sqrt(D))
  close(kv[:, :KV_HEADS], turned[:, HEADS : HEADS + KV_HEADS])
  close(kv[:, KV_HEADS:], heads[:, HEADS + KV_HEADS :])
