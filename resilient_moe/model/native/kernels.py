"""Kernels of our own for serving on CPU in float32; elsewhere XLA's code runs.

They read weights and cache where they lie, each once, where XLA on CPU first
copies an expert's matrix out of its stack, and they need no blocks of rows
for equal bits (`tile.h`). No gradients. `usable` says whether they run here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resilient_moe.model.native.library import register


def usable(dtype: Any) -> bool:
  """Whether arrays of `dtype` are computed by these kernels by default."""
  return (
    jnp.dtype(dtype) == jnp.float32
    and jax.default_backend() == "cpu"
    and not register()
  )


def grouped_matmul(
  x: jax.Array,  # [M, K]
  w: jax.Array,  # [G, K, N]
  slot: jax.Array,  # [M] int32
) -> jax.Array:
  """`x[i] @ w[slot[i]]`, [M, N]; zero where there is no such slot."""
  return _call("rmoe_grouped_matmul", (x.shape[0], w.shape[2]), x, w, slot)


def experts(
  stacks: dict[str, jax.Array],  # [L, S, ...], see `params.describe`
  layer: jax.Array,  # [] int32
  x: jax.Array,  # [T, D]
  token: jax.Array,  # [M] int32 row of `x`
  slots: jax.Array,  # [M] int32; S: none
  limit: float,  # of the clamped SwiGLU; 0: the plain one
  alpha: float,
) -> jax.Array:
  """Gated MLPs of the experts, [M, D]; zero where the slot is S."""
  none = jnp.zeros((0,), x.dtype)
  return _call(
    "rmoe_experts", (slots.shape[0], x.shape[1]), x, token, slots, layer,
    stacks["gate_up"], stacks["down"], stacks.get("gate_up_bias", none),
    stacks.get("down_bias", none), limit=np.float32(limit),
    alpha=np.float32(alpha),
  )  # fmt: skip


def attend(
  q: jax.Array,  # [G, Q, H, w]
  kv_new: jax.Array,  # [G, Q, heads, w]
  cache: jax.Array,  # [L, B, heads, T, w]; B = 0: nothing is cached
  layer: jax.Array,  # [] int32
  first_row: jax.Array,  # [] int32 cache row of the first sequence
  start: jax.Array,  # [G] int32
  length: jax.Array,  # [G] int32
  sinks: jax.Array,  # [H], or [0]
  window: jax.Array,  # [] int32; 0: none
  latent: int,
  block: int,
) -> jax.Array:
  """`attention.attend`, [G, Q, H, value]; zero behind `length`."""
  value = latent or q.shape[-1]
  return _call(
    "rmoe_attend", (*q.shape[:3], value), q, kv_new, cache, layer, first_row,
    start, length, sinks, window, latent=latent, block=block,
  )  # fmt: skip


def _call(
  name: str, shape: tuple[int, ...], *args: jax.Array, **attributes: Any
) -> jax.Array:
  result = jax.ShapeDtypeStruct(shape, jnp.float32)
  call = jax.ffi.ffi_call(name, result, vmap_method="sequential")
  return call(*args, **attributes)
