import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import ModelConfig, StepOptions
from resilient_moe.model.attention import Cached, Reach, attend, attend_plain
from resilient_moe.model.config import KERNEL_KINDS
from resilient_moe.model.projections import attention_output, queries_and_kv
from resilient_moe.model.rope import rope, turns
from tests.model.families import LATENT
from tests.model.harness import fast_jit, skip_without_bits, tiny_params

HEADS, KV_HEADS, D = 4, 2, 8


def dense(q, kv, at, latent=0, window=0, sinks=None):
  """Attention of one sequence in float64: q [Q, H, d], kv [T, heads, d]."""
  q, kv = q.astype(np.float64), kv.astype(np.float64)
  k, v = (kv, kv[..., :latent]) if latent else np.split(kv, 2, axis=1)
  out = np.zeros((*q.shape[:2], v.shape[-1]))
  for i, position in enumerate(at):
    seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
    for h in range(q.shape[1]):
      g = h // (q.shape[1] // k.shape[1])
      scores = k[seen, g] @ q[i, h]
      p = np.exp(scores)
      total = p.sum() + (0 if sinks is None else np.exp(sinks[h]))
      out[i, h] = p / total @ v[seen, g]
  return out


def draw(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(params=KERNEL_KINDS)
def kernels(request):
  return request.param


@pytest.fixture
def run(kernels):
  """`attend` over a cache [G, heads, T, w], by every kind of kernel."""

  def call(q, kv_new, start, length, cache, kv_block, **how):
    layers = np.stack([cache + 1, cache])  # the second is read
    # A row before those that are read.
    rows = np.concatenate([layers[:, :1] + 1, layers], axis=1)
    return _run(q, kv_new, start, length, rows, kv_block, kernels, **how)

  return call


@functools.partial(fast_jit, static_argnames=("kv_block", "kernels", "latent"))
def _run(
  q, kv_new, start, length, cache, kv_block, kernels, latent=0, sinks=None,
  window=None,
):  # fmt: skip
  options = StepOptions(kv_block=kv_block, kernels=kernels)
  reach = Reach(latent, sinks, window)
  old = Cached(cache, jnp.int32(1), jnp.int32(1))
  return attend(q, kv_new, start, length, old, options, reach)


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
def test_attention_over_a_cache_is_dense_attention(run, shape, rng):
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


def test_padded_queries_and_idle_rows_change_no_bit(run, rng):
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
def test_decoded_and_prefilled_tokens_have_equal_bits(
  run, kernels, kv_heads, rng
):
  """The same positions as one chunk, as two, and one by one."""
  skip_without_bits(kernels)
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


REACHES = {
  "sinks": {"sinks": np.array([-1, 0.5, 2, 3], np.float32)},
  "window-within-a-block": {"window": np.int32(5)},
  "window-over-blocks": {"window": np.int32(23)},
  "window-off": {"window": np.int32(0)},
  "latent": {"latent": 6},
  "all": {
    "sinks": np.array([1, -0.5, 2, 0], np.float32), "window": np.int32(9),
    "latent": 5,
  },
}  # fmt: skip


@pytest.mark.parametrize("reach", REACHES)
def test_sinks_windows_and_latents_are_those_of_dense_attention(
  run, reach, rng
):
  how, n, starts = REACHES[reach], 40, (0, 7, 16)
  heads = 1 if "latent" in how else 2 * KV_HEADS
  kv, q = draw(rng, 3, 64, heads, D), draw(rng, 3, n, HEADS, D)
  new = np.stack([kv[i, s : s + n] for i, s in enumerate(starts)])
  start, length = np.array(starts, np.int32), np.full(3, n, np.int32)
  out = run(q, new, start, length, cached(kv, starts, 64), 16, **how)
  for i, s in enumerate(starts):
    want = dense(q[i], kv[i], np.arange(s, s + n), **how)
    np.testing.assert_allclose(out[i], want, atol=2e-5)
    last = np.array([s + n - 1], np.int32)  # by itself, as when decoding
    one = run(
      q[i : i + 1, -1:], kv[i : i + 1, last], last, np.ones(1, np.int32),
      cached(kv[i : i + 1], last, 64), 16, **how,
    )  # fmt: skip
    np.testing.assert_array_equal(one[0, 0], out[i, -1])
  plain = fast_jit(lambda q, kv: attend_plain(q, kv, Reach(**how)))
  got = plain(q, kv[:, :n])
  for i in range(3):
    want = dense(q[i], kv[i], np.arange(n), **how)
    np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_blocks_before_every_window_are_not_read(run, rng):
  """NaN in them would reach a masked product."""
  kv, q = draw(rng, 2, 64, 2 * KV_HEADS, D), draw(rng, 2, 1, HEADS, D)
  at, one = np.array([50, 60], np.int32), np.ones(2, np.int32)
  cache = cached(kv, at, 64)
  cache[:, :, :32] = np.nan
  new = kv[np.arange(2), at][:, None]
  out = run(q, new, at, one, cache, 16, window=np.int32(12))
  for i in range(2):
    want = dense(q[i], kv[i], at[i : i + 1], window=12)
    np.testing.assert_allclose(out[i], want, atol=2e-5)


def test_without_a_cache_it_is_plain_attention(kernels, rng):
  q, kv = draw(rng, 2, 21, HEADS, D), draw(rng, 2, 21, 2 * KV_HEADS, D)
  zero, n = np.zeros(2, np.int32), np.full(2, 21, np.int32)
  blocks = fast_jit(
    lambda: attend(
      q, kv, zero, n, None, StepOptions(kv_block=8, kernels=kernels)
    )
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
  got = fast_jit(lambda x: rope(x, turns(jnp.asarray(at), config)))(x)
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_queries_are_scaled_and_values_left(rng):
  c = ModelConfig(n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=D)
  h = draw(rng, 5, 16)
  w = {"qkv": draw(rng, 16, (HEADS + 2 * KV_HEADS) * D)}
  at = jnp.arange(5, dtype=jnp.int32)
  before = lambda h: queries_and_kv(c, StepOptions(), w, h, turns(at, c))
  q, kv = fast_jit(before)(h)
  heads = (h @ w["qkv"]).reshape(5, -1, D)
  turned = fast_jit(lambda x: rope(x, turns(at, c)))(heads)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(q, turned[:, :HEADS] / np.sqrt(D))
  close(kv[:, :KV_HEADS], turned[:, HEADS : HEADS + KV_HEADS])
  close(kv[:, KV_HEADS:], heads[:, HEADS + KV_HEADS :])


def test_absorbed_projections_are_the_expanded_ones(rng):
  """DeepSeek-V2, equations 9 to 16, with heads as wide as they are trained."""
  c = dataclasses.replace(LATENT, rope_theta=100.0)
  h = draw(rng, 6, 32)
  w = {n: x[0] for n, x in tiny_params(c)["groups"][0]["attention"].items()}
  at = jnp.arange(6, dtype=jnp.int32)
  before = lambda h: queries_and_kv(c, StepOptions(), w, h, turns(at, c))
  q, kv = fast_jit(before)(h)
  out = attend_plain(q[None], kv[None], Reach(c.kv_rank))[0]
  got = fast_jit(lambda out: attention_output(c, StepOptions(), w, out))(out)
  heads = (h @ w["q"]).reshape(6, 4, 10)
  low = h @ w["kv_a"]
  latent = low[:, :16]
  latent /= np.sqrt((latent**2).mean(-1, keepdims=True) + 1e-6)
  latent *= w["kv_a_norm"]
  turn = fast_jit(lambda x: rope(x, turns(at, c)))
  queries = np.concatenate([heads[..., :6], turn(heads[..., 6:])], axis=-1)
  key = np.broadcast_to(turn(low[:, None, 16:]), (6, 4, 4))
  keys = np.einsum("tr,hpr->thp", latent, w["k_up"])
  keys = np.concatenate([keys, key], axis=-1)
  values = np.einsum("tr,hrv->thv", latent, w["v_up"])
  wide = np.zeros((6, 4, 10), np.float32)  # values as wide as keys
  wide[..., :8] = values
  want = dense(
    queries / np.sqrt(10), np.concatenate([keys, wide], axis=1), range(6)
  )
  want = want[..., :8].reshape(6, -1) @ w["out"]
  np.testing.assert_allclose(got, want, atol=2e-5)
