"""Matrix products of a step: the native kernels', or XLA's in blocks of rows.

The kernels' bits don't depend on the number of rows; XLA's do on CPU, so that
without the kernels rows are computed in blocks (`rows.py`).
"""

import jax
import jax.numpy as jnp

from resilient_moe.model import native
from resilient_moe.model.config import StepOptions

_ALL = 1 << 30  # rows of a block: all of them, and at least two


def is_native(options: StepOptions, *arrays: jax.Array) -> bool:
  """Whether products of these arrays are computed by the native kernels."""
  return options.kernels == "native" and all(
    native.usable(a.dtype) for a in arrays
  )


def row_block(options: StepOptions, x: jax.Array) -> int:
  """Rows that `rows.rowwise` is to compute at once; 0: as XLA likes it."""
  return _ALL if is_native(options, x) else options.row_block


def matmul(options: StepOptions, x: jax.Array, w: jax.Array) -> jax.Array:
  """[N, K] @ [K, M] -> [N, M]."""
  if not is_native(options, x, w):
    return x @ w

  def kernel(x: jax.Array, w: jax.Array) -> jax.Array:
    slot = jnp.zeros((x.shape[0],), jnp.int32)
    return native.grouped_matmul(x, w[None], slot)

  return native.on_cpu(kernel, jnp.matmul)(x, w)


def per_head(options: StepOptions, x: jax.Array, w: jax.Array) -> jax.Array:
  """Each head by its own matrix, [N, H, p], [H, p, r] -> [N, H, r]."""

  def einsum(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("nhp,hpr->nhr", x, w)

  def kernel(x: jax.Array, w: jax.Array) -> jax.Array:
    n, h, p = x.shape
    slot = jnp.tile(jnp.arange(h, dtype=jnp.int32), n)
    return native.grouped_matmul(x.reshape(-1, p), w, slot).reshape(n, h, -1)

  if not is_native(options, x, w):
    return einsum(x, w)
  return native.on_cpu(kernel, einsum)(x, w)
