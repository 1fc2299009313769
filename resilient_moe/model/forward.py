"""Whole sequences at once: scoring (`forward`) and training."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from resilient_moe.model.attention import attend, attend_plain
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.dispatch import make_exchange
from resilient_moe.model.layers import run_layers
from resilient_moe.model.rows import rms_norm, rowwise


def unembed(
  config: ModelConfig, params: dict[str, Any], x: jax.Array, row_block: int
) -> jax.Array:
  """Final norm and vocabulary projection, [N, D] -> [N, V] float32."""

  def rows(w: tuple, x: jax.Array) -> jax.Array:
    h = rms_norm(x, w[0], config.norm_eps)
    # Not `embed.T`: hoisted out of the loop over blocks, the transposed copy
    # is multiplied by another kernel, with other bits than a lone block.
    product = "nd,vd->nv" if tied else "nd,dv->nv"
    return jnp.einsum(product, h, w[1]).astype(jnp.float32)

  tied = config.tied_embeddings
  head = params["embed"] if tied else params["lm_head"]
  return rowwise(rows, (params["final_norm"], head), x, row_block)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _forward(
  config: ModelConfig, options: StepOptions, params: Any, tokens: jax.Array
) -> jax.Array:
  b, t = tokens.shape
  positions = jnp.tile(jnp.arange(t, dtype=jnp.int32), b)
  start = jnp.zeros((b,), jnp.int32)
  length = jnp.full((b,), t, jnp.int32)
  split = lambda a: a.reshape(b, t, *a.shape[1:])

  def attend_all(_: jax.Array, q: jax.Array, kv: jax.Array) -> jax.Array:
    out = attend(split(q), split(kv), start, length, None, options)
    return out.reshape(b * t, *out.shape[2:])

  x, _, _ = run_layers(
    config, params, params["embed"][tokens.reshape(-1)], positions,
    jnp.zeros((config.n_experts,), bool), attend_all,
    make_exchange(options, 1), lambda chosen: chosen, options.row_block,
  )  # fmt: skip
  return split(unembed(config, params, x, options.row_block))


def forward(
  config: ModelConfig,
  params: dict[str, Any],
  tokens: jax.Array,
  options: StepOptions | None = None,
) -> jax.Array:
  """Logits of every position, [B, T] int32 -> [B, T, V] float32.

  One device. With row-invariant numerics (the default) bit-equal to what the
  serving step computes by chunked prefill and decode.
  """
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens: {tokens.dtype} {tokens.shape}; an integer [B, T] is needed"
    )
  used = dataclasses.replace(options or StepOptions(), experts="blocks")
  return _forward(config, used, params, tokens)


def train_forward(
  config: ModelConfig, params: dict[str, Any], tokens: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Differentiable: logits [B, T, V] float32 and router statistics.

  The statistics are `router_probs_mean` and `expert_load`, both [L_moe, E].
  """
  b, t = tokens.shape
  options = StepOptions(row_block=0, experts="static")
  positions = jnp.tile(jnp.arange(t, dtype=jnp.int32), b)
  split = lambda a: a.reshape(b, t, *a.shape[1:])

  def attend_all(_: jax.Array, q: jax.Array, kv: jax.Array) -> jax.Array:
    out = attend_plain(split(q), split(kv))
    return out.reshape(b * t, *out.shape[2:])

  x, _, stats = run_layers(
    config, params, params["embed"][tokens.reshape(-1)], positions,
    jnp.zeros((config.n_experts,), bool), attend_all,
    make_exchange(options, 1), lambda chosen: chosen, 0,
  )  # fmt: skip
  return split(unembed(config, params, x, 0)), stats
