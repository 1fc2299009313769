"""Matrix products of a step: the native kernels', or XLA's in blocks of rows.

The kernels' bits don't depend on the number of rows; XLA's do on CPU, so that
without the kernels rows are computed in blocks (`rows.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from resilient_moe.model import native
from resilient_moe.model.config import StepOptions

_ALL = 1 << 30  # rows of a block: all of them, and at least two


def is_native(options: StepOptions, *arrays: Any) -> bool:
  """Whether products of these arrays are computed by the native kernels."""
  return options.kernels == "native" and all(
    native.usable(a.dtype) for a in arrays
  )


def either(
  options: StepOptions,
  arrays: Sequence[Any],
  kernel: Callable[[], jax.Array],
  otherwise: Callable[[], jax.Array],
) -> jax.Array:
  """`kernel()` where it computes with such arrays, or else its XLA form.

  A program that is lowered for another platform has the XLA form, too.
  """
  if not is_native(options, *arrays):
    return otherwise()
  return jax.lax.platform_dependent(cpu=kernel, default=otherwise)


def row_block(options: StepOptions, x: jax.Array) -> int:
  """Rows that `rows.rowwise` is to compute at once; 0: as XLA likes it."""
  return _ALL if is_native(options, x) else options.row_block


class Stacked(NamedTuple):
  """A layer's matrix (or one a head) where it lies, among other layers'.

  A kernel reads it there; XLA's code slices it out.
  """

  stack: jax.Array  # [L, ..., K, M]
  layer: jax.Array  # [] int32

  @property
  def dtype(self) -> jnp.dtype:
    return self.stack.dtype

  def alone(self) -> jax.Array:
    return _pick(self.stack, self.layer)


Matrix = jax.Array | Stacked


def layer_of(group: Any, layer: jax.Array) -> Any:
  """The parameters of one layer of a run of equal layers."""
  return jax.tree.map(
    lambda w: Stacked(w, layer) if w.ndim > 2 else _pick(w, layer), group
  )


def _pick(stack: jax.Array, layer: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _alone(w: Matrix) -> jax.Array:
  return w.alone() if isinstance(w, Stacked) else w


def _stacked(w: Matrix) -> Stacked:
  return w if isinstance(w, Stacked) else Stacked(w[None], jnp.int32(0))


def widened(w: Matrix) -> Matrix:
  """In float32."""
  return w if w.dtype == jnp.float32 else _alone(w).astype(jnp.float32)


def matmul(options: StepOptions, x: jax.Array, w: Matrix) -> jax.Array:
  """[N, K] @ [K, M] -> [N, M]."""

  def kernel() -> jax.Array:
    stack, layer = _stacked(w)
    slot = jnp.broadcast_to(layer, (x.shape[0],))
    return native.grouped_matmul(x, stack, slot)

  return either(options, (x, w), kernel, lambda: x @ _alone(w))


def per_head(options: StepOptions, x: jax.Array, w: Matrix) -> jax.Array:
  """Each head by its own matrix, [N, H, p], [H, p, r] -> [N, H, r]."""

  def kernel() -> jax.Array:
    stack, layer = _stacked(w)
    n, h, p = x.shape
    slot = jnp.tile(layer * h + jnp.arange(h, dtype=jnp.int32), n)
    every = stack.reshape(-1, *stack.shape[2:])  # [L * H, p, r]
    y = native.grouped_matmul(x.reshape(-1, p), every, slot)
    return y.reshape(n, h, -1)

  einsum = lambda: jnp.einsum("nhp,hpr->nhr", x, _alone(w))
  return either(options, (x, w), kernel, einsum)
