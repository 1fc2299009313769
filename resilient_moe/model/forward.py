"""Whole sequences at once: scoring (`forward`) and training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from resilient_moe.model.attention import Reach, attend, attend_plain
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.dispatch import make_exchange
from resilient_moe.model.layers import run_layers
from resilient_moe.model.lost import Lost
from resilient_moe.model.products import matmul, row_block
from resilient_moe.model.rows import rms_norm, rowwise


def unembed(
  config: ModelConfig,
  options: StepOptions,
  params: dict[str, Any],
  x: jax.Array,
) -> jax.Array:
  """Final norm and vocabulary projection, [N, D] -> [N, V] float32."""

  def rows(w: tuple, x: jax.Array) -> jax.Array:
    h = rms_norm(x, w[0], config.norm_eps)
    if not tied:
      return matmul(options, h, w[1]).astype(jnp.float32)
    # Not `embed.T`: hoisted out of the loop over blocks, the transposed copy
    # is multiplied by another kernel, with other bits than a lone block.
    return jnp.einsum("nd,vd->nv", h, w[1]).astype(jnp.float32)

  tied = config.tied_embeddings
  weights = params["final_norm"], params["embed" if tied else "lm_head"]
  block = options.row_block if tied else row_block(options, x)
  return rowwise(rows, weights, x, block)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _forward(
  config: ModelConfig,
  options: StepOptions,
  params: Any,
  tokens: jax.Array,
  lost: Lost | None,
) -> jax.Array:
  x, _ = _serving_layers(config, options, params, tokens, lost)
  logits = unembed(config, options, params, x)
  return logits.reshape(*tokens.shape, -1)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _load(
  config: ModelConfig, options: StepOptions, params: Any, tokens: jax.Array
) -> jax.Array:
  _, stats = _serving_layers(config, options, params, tokens, None)
  return stats["expert_load"]


def _serving_layers(
  config: ModelConfig,
  options: StepOptions,
  params: Any,
  tokens: jax.Array,
  lost: Lost | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  b, t = tokens.shape
  start = jnp.zeros((b,), jnp.int32)
  length = jnp.full((b,), t, jnp.int32)

  def attend_all(q: jax.Array, kv: jax.Array, reach: Reach) -> jax.Array:
    return attend(q, kv, start, length, None, options, reach)

  return _layers(config, options, params, tokens, attend_all, lost)


def _layers(
  config: ModelConfig,
  options: StepOptions,
  params: Any,
  tokens: jax.Array,
  attend_all: Callable[[jax.Array, jax.Array, Reach], jax.Array],
  lost: Lost | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """All layers over whole sequences: x [B * T, D], router statistics."""
  b, t = tokens.shape
  positions = jnp.tile(jnp.arange(t, dtype=jnp.int32), b)
  split = lambda a: a.reshape(b, t, *a.shape[1:])

  def attend_flat(
    _: jax.Array, q: jax.Array, kv: jax.Array, reach: Reach
  ) -> jax.Array:
    out = attend_all(split(q), split(kv), reach)
    return out.reshape(b * t, *out.shape[2:])

  def to_slots(layer: jax.Array, chosen: jax.Array) -> jax.Array:
    if lost is None or lost.answers is None:
      return chosen
    return lost.answers[layer][chosen]

  masked = jnp.zeros((config.n_experts,), bool) if lost is None else lost.masked
  x, _, stats = run_layers(
    config, options, params, params["embed"][tokens.reshape(-1)], positions,
    masked, attend_flat, make_exchange(config, options, 1), to_slots,
  )  # fmt: skip
  return x, stats


def forward(
  config: ModelConfig,
  params: dict[str, Any],
  tokens: jax.Array,
  options: StepOptions | None = None,
  lost: Lost | None = None,
) -> jax.Array:
  """Logits of every position, [B, T] int32 -> [B, T, V] float32.

  One device. With row-invariant numerics (the default) bit-equal to what the
  serving step computes by chunked prefill and decode. `lost` says which
  experts are gone and what is done about it (`lost.py`).
  """
  tokens = _checked(tokens)
  used = dataclasses.replace(options or StepOptions(), experts="blocks")
  return _forward(config, used, params, tokens, lost)


def expert_load(
  config: ModelConfig,
  params: dict[str, Any],
  tokens: jax.Array,
  options: StepOptions | None = None,
) -> jax.Array:
  """Share of a text's assignments that each expert gets, [L_moe, E]."""
  tokens = _checked(tokens)
  used = dataclasses.replace(options or StepOptions(), experts="blocks")
  return _load(config, used, params, tokens)


def _checked(tokens: Any) -> jax.Array:
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens: {tokens.dtype} {tokens.shape}; an integer [B, T] is needed"
    )
  return tokens


def train_forward(
  config: ModelConfig, params: dict[str, Any], tokens: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Differentiable: logits [B, T, V] float32 and router statistics.

  The statistics are `router_probs_mean` and `expert_load`, both [L_moe, E].
  """
  options = StepOptions(row_block=0, experts="static", kernels="xla")
  x, stats = _layers(config, options, params, tokens, attend_plain)
  return unembed(config, options, params, x).reshape(*tokens.shape, -1), stats
