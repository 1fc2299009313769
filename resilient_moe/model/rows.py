"""Row-wise arithmetic whose bits don't depend on the number of rows.

XLA's CPU matrix product has classes of row counts (2 to 32, and the rest)
with different bits, and its reductions change theirs with shape and fusion.
So rows are computed in blocks of at most 32, and sums are explicit pairwise
halving adds (`jax_facts.md`, "What keeps results the same, bit for bit").
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def pairwise_sum(x: jax.Array) -> jax.Array:
  """Sum over the last axis by halving adds, [..., n] -> [...]."""
  n = x.shape[-1]
  while n > 1:
    half = n // 2
    tail = x[..., 2 * half :]
    x = x[..., :half] + x[..., half : 2 * half]
    if tail.shape[-1]:
      x = jnp.concatenate([x, tail], axis=-1)
    n = x.shape[-1]
  return x[..., 0]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """RMSNorm in float32, cast, then scaled: [..., D], [D] -> [..., D].

  As a matrix whatever it is: with more axes XLA's CPU code for it contracts
  products and sums otherwise for other numbers of rows (seen for heads).
  """
  y = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  mean = pairwise_sum(y * y)[:, None] / y.shape[-1]
  y = (y * jax.lax.rsqrt(mean + eps)).astype(x.dtype) * scale[None, :]
  return y.reshape(x.shape)


def softmax(logits: jax.Array) -> jax.Array:
  """Softmax over the last axis with a pairwise sum, [..., n]."""
  top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  unnormalised = jnp.exp(logits - top)
  return unnormalised / pairwise_sum(unnormalised)[..., None]


def rowwise(fn: Callable[..., Any], weights: Any, rows: Any, block: int) -> Any:
  """`fn(weights, rows)` on blocks of rows; equal bits for any row count.

  `rows` is a pytree of [N, ...] arrays, as is the result. Under `vmap` (the
  logical ranks) the blocks of one rank after the other are computed, so that
  a batched product never merges the ranks' rows into another class.
  """
  if not block:
    return fn(weights, rows)
  blocked = jax.custom_batching.sequential_vmap(
    lambda w, r: _in_blocks(fn, w, r, block)
  )
  return blocked(weights, rows)


def _in_blocks(fn: Callable, weights: Any, rows: Any, block: int) -> Any:
  n = jax.tree.leaves(rows)[0].shape[0]
  if n <= block:
    # One row alone is a matrix-vector product: another class of bits.
    padded = _pad_rows(rows, max(n, 2))
    return jax.tree.map(lambda y: y[:n], fn(weights, padded))
  count = -(-n // block)
  block = -(-n // count)  # equal blocks: next to nothing is padding
  split = jax.tree.map(
    lambda x: x.reshape(count, block, *x.shape[1:]),
    _pad_rows(rows, count * block),
  )
  out = jax.lax.map(lambda r: fn(weights, r), split)
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:n], out)


def _pad_rows(rows: Any, n: int) -> Any:
  def pad(x: jax.Array) -> jax.Array:
    widths = [(0, n - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, widths)

  return jax.tree.map(pad, rows)
