"""Attention over fixed KV blocks.

The KV cache is read, never written (DESIGN 2.2): the new keys and values are
spliced into their absolute positions inside the fixed blocks, so that a
decoded token and a re-prefilled one are reduced in the same order and have
the same bits. The blocks are visited with a running softmax (Dao et al.,
FlashAttention, 2022, algorithm 1); a block that is masked for a row changes
none of its bits, so rows of different lengths share one loop.

What a family adds is data: a sink is where the running softmax starts from,
a window is where its loop does. A head of the cache is either keys (the first
half of the heads) or values, or, with latents, both (`latent` > 0).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from resilient_moe.model import native
from resilient_moe.model.config import StepOptions
from resilient_moe.model.products import either
from resilient_moe.model.rows import pairwise_sum

# block number [] -> what is known of its tokens, [G, heads, kv_block, w]
Block = Callable[[jax.Array], jax.Array]


class Cached(NamedTuple):
  """What lies before the new tokens: a cache row for each sequence."""

  cache: jax.Array  # [L, B, heads, T, w]
  layer: jax.Array  # [] int32
  row: jax.Array  # [] int32 of the first sequence; the others' follow it

  def blocks(self, sequences: int, size: int) -> Block:
    """Of these many sequences; block `j` begins at position `j * size`."""
    _, _, heads, _, width = self.cache.shape
    shape = (1, sequences, heads, size, width)

    def block(j: jax.Array) -> jax.Array:
      index = (self.layer, self.row, 0, j * size, 0)
      return jax.lax.dynamic_slice(self.cache, index, shape)[0]

    return block


class Reach(NamedTuple):
  """What the queries of a layer see beside the causal rest."""

  latent: int = 0  # width of a value that is the start of its own key
  sinks: jax.Array | None = None  # [H] a logit of each head, without a value
  window: jax.Array | None = None  # [] int32 positions seen; 0: all before


EVERYTHING = Reach()


def attend(
  q: jax.Array,  # [G, Q, H, w]
  kv_new: jax.Array,  # [G, Q, heads, w] keys and values of the same tokens
  start: jax.Array,  # [G] int32 position of each sequence's first query
  length: jax.Array,  # [G] int32 queries that count; the rest is padding
  cached: Cached | None,  # None: nothing lies before them
  options: StepOptions,
  reach: Reach = EVERYTHING,
) -> jax.Array:
  """Causal attention of `Q` new tokens of `G` sequences, [G, Q, H, value]."""
  lying = cached and cached.blocks(q.shape[0], options.kv_block)
  blocks = lambda: attend_blocks(
    q, kv_new, start, length, lying, options, reach
  )

  def kernel() -> jax.Array:
    none = jnp.zeros((0,) * 5, q.dtype)
    old = cached or Cached(none, jnp.int32(0), jnp.int32(0))
    sinks, window = reach.sinks, reach.window
    return native.attend(
      q, kv_new, old.cache, old.layer, old.row, start, length,
      jnp.zeros((0,), q.dtype) if sinks is None else sinks,
      jnp.int32(0) if window is None else window,
      latent=reach.latent, block=options.kv_block,
    )  # fmt: skip

  return either(options, (q, kv_new), kernel, blocks)


def attend_blocks(
  q: jax.Array,
  kv_new: jax.Array,
  start: jax.Array,
  length: jax.Array,
  cached: Block | None,
  options: StepOptions,
  reach: Reach = EVERYTHING,
) -> jax.Array:
  """`attend` in XLA, over a cache that lies anyhow."""
  g, n_q, h, d = q.shape
  k_heads = 1 if reach.latent else kv_new.shape[2] // 2
  group = h // k_heads
  # At most 32 query rows in one product: one class of bits (rows.py).
  width = max(1, min(n_q, 32 // group))
  count = -(-n_q // width)
  q = jnp.pad(q, ((0, 0), (0, count * width - n_q), (0, 0), (0, 0)))
  q = q.reshape(g, count, width, k_heads, group, d)
  q = jnp.moveaxis(q, (1, 3), (0, 2))  # [count, G, K, width, group, d]
  block = _spliced(kv_new, start, cached, options.kv_block)
  stop = jnp.where(length > 0, start + length, 0)

  def part(index: jax.Array, q_part: jax.Array) -> jax.Array:
    first = index * width
    end = jnp.max(jnp.minimum(stop, start + first + width))
    rows = jnp.repeat(jnp.arange(width, dtype=jnp.int32), group)
    at = start[:, None] + first + rows[None, :]  # [G, width * group]
    flat = q_part.reshape(g, k_heads, width * group, d)
    if flat.shape[2] == 1:  # a lone row would be a matrix-vector product
      flat, at = jnp.repeat(flat, 2, axis=2), jnp.repeat(at, 2, axis=1)
    begin = _begin(start + first, length > first, reach)
    out = _over_blocks(flat, at, block, begin, end, options.kv_block, reach)
    out = out[:, :, : width * group]
    return out.reshape(g, k_heads, width, group, out.shape[-1])

  if count == 1:
    out = part(jnp.int32(0), q[0])[None]
  else:
    indices = jnp.arange(count, dtype=jnp.int32)
    out = jax.lax.map(lambda a: part(*a), (indices, q))
  out = jnp.moveaxis(out, (0, 2), (1, 3))  # [G, count, width, K, group, d]
  return out.reshape(g, count * width, h, out.shape[-1])[:, :n_q]


def _begin(start: jax.Array, live: jax.Array, reach: Reach) -> jax.Array:
  """The first position that any sequence's first query sees."""
  if reach.window is None:
    return jnp.int32(0)
  seen = jnp.where(reach.window > 0, start - reach.window + 1, 0)
  last = jnp.iinfo(jnp.int32).max  # sequences that don't count don't widen it
  return jnp.maximum(jnp.min(jnp.where(live, seen, last)), 0)


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
  q: jax.Array,  # [G, K, M, w]
  at: jax.Array,  # [G, M] int32 positions
  block: Block,
  begin: jax.Array,  # [] int32 first position of anybody's interest
  end: jax.Array,  # [] int32 behind the last one
  size: int,
  reach: Reach,
) -> jax.Array:
  """Running softmax over the blocks, [G, K, M, value]."""
  lanes = jnp.arange(size, dtype=jnp.int32)

  def body(j: jax.Array, carry: tuple) -> tuple:
    top, total, acc = carry
    k, v = _keys_and_values(block(j), reach.latent)
    scores = jnp.einsum(
      "gkmd,gktd->gkmt", q, k, preferred_element_type=jnp.float32
    )
    seen = _seen((j * size + lanes)[None, None, :], at[:, :, None], reach)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    p = jnp.exp(scores - new_top[..., None])
    keep = jnp.exp(top - new_top)
    total = total * keep + pairwise_sum(p)
    found = jnp.einsum("gkmt,gktd->gkmd", p, v.astype(jnp.float32))
    return new_top, total, acc * keep[..., None] + found

  width = reach.latent or q.shape[-1]
  acc = jnp.zeros((*q.shape[:3], width), jnp.float32)
  init = (*_start(q.shape[:3], reach), acc)
  blocks = (end + size - 1) // size
  _, total, acc = jax.lax.fori_loop(begin // size, blocks, body, init)
  return (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)


def _keys_and_values(
  cached: jax.Array, latent: int
) -> tuple[jax.Array, jax.Array]:
  """[G, heads, T, w] -> keys [G, K, T, w], values [G, K, T, value]."""
  if latent:
    return cached, cached[..., :latent]
  k, v = jnp.split(cached, 2, axis=1)
  return k, v


def _seen(key: jax.Array, query: jax.Array, reach: Reach) -> jax.Array:
  """Whether a query at one position sees a key at another."""
  seen = key <= query
  if reach.window is None:
    return seen
  near = key > query - reach.window
  return seen & (near | (reach.window == 0))


def _start(
  shape: tuple[int, ...], reach: Reach
) -> tuple[jax.Array, jax.Array]:
  """The running softmax before any key: its maximum and its total."""
  if reach.sinks is None:
    # Finite, so that a padded row that sees nothing stays free of NaN.
    least = jnp.finfo(jnp.float32).min
    return jnp.full(shape, least, jnp.float32), jnp.zeros(shape, jnp.float32)
  _, k_heads, rows = shape  # rows: queries, and in each the group's heads
  heads = reach.sinks.astype(jnp.float32).reshape(k_heads, -1)
  tiled = jnp.tile(heads, (1, rows // heads.shape[1]))
  return jnp.broadcast_to(tiled[None], shape), jnp.ones(shape, jnp.float32)


def attend_plain(
  q: jax.Array, kv: jax.Array, reach: Reach = EVERYTHING
) -> jax.Array:
  """With a gradient: [G, T, H, w], [G, T, heads, w] -> [G, T, H, value].

  For training: the block loop has no reverse-mode gradient.
  """
  g, n, h, _ = q.shape
  k, v = _keys_and_values(jnp.swapaxes(kv, 1, 2), reach.latent)
  q = q.reshape(g, n, k.shape[1], -1, q.shape[-1])
  scores = jnp.einsum("gqkmd,gktd->gkmqt", q, k)
  at = jnp.arange(n)
  seen = _seen(at[None, :], at[:, None], reach)
  scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
  if reach.sinks is not None:
    sinks = reach.sinks.reshape(1, k.shape[1], -1, 1, 1)
    sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, sinks.astype(scores.dtype)], axis=-1)
  p = jax.nn.softmax(scores, axis=-1)[..., :n]
  out = jnp.einsum("gkmqt,gktd->gqkmd", p, v)
  return out.reshape(g, n, h, v.shape[-1])
