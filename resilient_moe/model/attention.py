"""Grouped-query attention over fixed KV blocks, and RoPE.

The KV cache is read, never written (DESIGN 2.2): the new keys and values are
spliced into their absolute positions inside the fixed blocks, so that a
decoded token and a re-prefilled one are reduced in the same order and have
the same bits. The blocks are visited with a running softmax (Dao et al.,
FlashAttention, 2022, algorithm 1); a block that is masked for a row changes
none of its bits, so rows of different lengths share one loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.rows import pairwise_sum

# block number [] -> keys and values side by side, [G, 2K, kv_block, d]
Block = Callable[[jax.Array], jax.Array]


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotates halves (x1, x2): [N, H, d], [N] -> [N, H, d]."""
  half = x.shape[-1] // 2
  inv = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[:, None] * inv[None, :]
  cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
  x1, x2 = x[..., :half], x[..., half:]
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def split_heads(
  config: ModelConfig, qkv: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """[N, (H+2K)d] -> q [N, H, d] (scaled, rotated), kv [N, 2K, d].

  Keys and values lie side by side, so that cache, delta and checkpoint are
  one array each.
  """
  n, d = qkv.shape[0], config.head_dim
  heads = qkv.reshape(n, config.n_heads + 2 * config.n_kv_heads, d)
  q, k, v = jnp.split(
    heads, [config.n_heads, config.n_heads + config.n_kv_heads], axis=1
  )
  q = rope(q, positions, config.rope_theta) * (d**-0.5)
  k = rope(k, positions, config.rope_theta)
  return q, jnp.concatenate([k, v], axis=1)


def attend(
  q: jax.Array,  # [G, Q, H, d]
  kv_new: jax.Array,  # [G, Q, 2K, d] keys and values of the same tokens
  start: jax.Array,  # [G] int32 position of each sequence's first query
  length: jax.Array,  # [G] int32 queries that count; the rest is padding
  cached: Block | None,  # what lies before them; None: nothing
  options: StepOptions,
) -> jax.Array:
  """Causal attention of `Q` new tokens of `G` sequences, [G, Q, H, d]."""
  g, n_q, h, d = q.shape
  k_heads = kv_new.shape[2] // 2
  group = h // k_heads
  # At most 32 query rows in one product: one class of bits (rows.py).
  width = max(1, min(n_q, 32 // group))
  count = -(-n_q // width)
  q = jnp.pad(q, ((0, 0), (0, count * width - n_q), (0, 0), (0, 0)))
  q = q.reshape(g, count, width, k_heads, group, d)
  q = jnp.moveaxis(q, (1, 3), (0, 2))  # [count, G, K, width, group, d]
  block = _spliced(kv_new, start, cached, options.kv_block)
  reach = jnp.where(length > 0, start + length, 0)

  def part(index: jax.Array, q_part: jax.Array) -> jax.Array:
    first = index * width
    end = jnp.max(jnp.minimum(reach, start + first + width))
    rows = jnp.repeat(jnp.arange(width, dtype=jnp.int32), group)
    at = start[:, None] + first + rows[None, :]  # [G, width * group]
    flat = q_part.reshape(g, k_heads, width * group, d)
    if flat.shape[2] == 1:  # a lone row would be a matrix-vector product
      flat, at = jnp.repeat(flat, 2, axis=2), jnp.repeat(at, 2, axis=1)
    out = _over_blocks(flat, at, block, end, options.kv_block)
    out = out[:, :, : width * group]
    return out.reshape(g, k_heads, width, group, d)

  if count == 1:
    out = part(jnp.int32(0), q[0])[None]
  else:
    indices = jnp.arange(count, dtype=jnp.int32)
    out = jax.lax.map(lambda a: part(*a), (indices, q))
  out = jnp.moveaxis(out, (0, 2), (1, 3))  # [G, count, width, K, group, d]
  return out.reshape(g, count * width, h, d)[:, :n_q]


def _spliced(
  kv_new: jax.Array, start: jax.Array, cached: Block | None, size: int
) -> Block:
  """Block `j` of the cache with the new keys and values put in their place."""
  n_q = kv_new.shape[1]
  new = jnp.swapaxes(kv_new, 1, 2)  # [G, 2K, Q, d]
  padded = jnp.pad(new, ((0, 0), (0, 0), (size, size), (0, 0)))

  def new_block(j: jax.Array) -> jax.Array:
    if n_q == 1:
      return new  # broadcasts over the block's lanes
    offset = jnp.clip(j * size - start + size, 0, n_q + size)
    cut = lambda x, o: jax.lax.dynamic_slice_in_dim(x, o, size, axis=1)
    return jax.vmap(cut)(padded, offset)

  def block(j: jax.Array) -> jax.Array:
    if cached is None:
      return new_block(j)
    at = j * size + jnp.arange(size, dtype=jnp.int32)[None, :]
    fresh = (at >= start[:, None]) & (at < start[:, None] + n_q)
    return jnp.where(fresh[:, None, :, None], new_block(j), cached(j))

  return block


def _over_blocks(
  q: jax.Array, at: jax.Array, block: Block, end: jax.Array, size: int
) -> jax.Array:
  """Running softmax: q [G, K, M, d] at positions [G, M] -> [G, K, M, d]."""
  lanes = jnp.arange(size, dtype=jnp.int32)

  def body(j: jax.Array, carry: tuple) -> tuple:
    top, total, acc = carry
    k, v = jnp.split(block(j), 2, axis=1)
    scores = jnp.einsum("gkmd,gktd->gkmt", q, k)
    seen = (j * size + lanes)[None, None, :] <= at[:, :, None]
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    p = jnp.exp(scores - new_top[..., None])
    keep = jnp.exp(top - new_top)
    total = total * keep + pairwise_sum(p)
    acc = acc * keep[..., None] + jnp.einsum("gkmt,gktd->gkmd", p, v)
    return new_top, total, acc

  shape = q.shape[:3]
  # Finite, so that a padded row that sees nothing stays free of NaN.
  top = jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32)
  init = (top, jnp.zeros(shape, jnp.float32), jnp.zeros(q.shape, jnp.float32))
  blocks = (end + size - 1) // size
  _, total, acc = jax.lax.fori_loop(0, blocks, body, init)
  return (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)


def attend_plain(q: jax.Array, kv: jax.Array) -> jax.Array:
  """Causal attention with a gradient: [G,Q,H,d], [G,Q,2K,d] -> [G,Q,H,d].

  For training: the block loop has no reverse-mode gradient.
  """
  g, n, h, d = q.shape
  k, v = jnp.split(kv, 2, axis=2)
  q = q.reshape(g, n, k.shape[2], -1, d)
  scores = jnp.einsum("gqkmd,gtkd->gkmqt", q, k)
  causal = jnp.tril(jnp.ones((n, n), bool))
  scores = jnp.where(causal[None, None, None], scores, -jnp.inf)
  p = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum("gkmqt,gtkd->gqkmd", p, v).reshape(g, n, h, d)
