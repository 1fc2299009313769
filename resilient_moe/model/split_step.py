"""One serving step of an attention rank, cut where its experts are elsewhere.

  begin    tokens -> up to the first MoE layer's experts
  go_on    the experts' outputs -> up to the next layer's experts
  finish   the last outputs -> delta and sampled tokens

Between two of them the rank sends embeddings to expert ranks and waits
(`datapath.Exchange`). The arithmetic is that of `step.rank_step`, function by
function, so that tokens equal the collocated deployment's; no program here
knows of another device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.experts import kernel_of
from resilient_moe.model.layers import attend_layer, combine, run_layers
from resilient_moe.model.products import layer_of
from resilient_moe.model.rope import turns
from resilient_moe.model.step import (
  attend_cached,
  lanes,
  sample_lanes,
  unpack,
)

Tree = dict[str, Any]


class Midway(NamedTuple):
  """A step that waits for the experts of a layer."""

  x: jax.Array  # [N, D] residual stream
  h: jax.Array  # [N, D] what the experts see
  chosen: jax.Array  # [N, k] int32 experts
  gates: jax.Array  # [N, k] float32 their weights


def begin(
  config: ModelConfig,
  options: StepOptions,
  params: Tree,  # without experts
  cache: jax.Array,  # [L, 1, B, 2K, T, d]
  masked: jax.Array,  # [E] bool
  ints: jax.Array,  # [1, width] from `step.pack`
) -> tuple[Midway, jax.Array]:
  """Embedding, dense layers, first MoE layer; new KV [l, N, 2K, d]."""
  rows, chunk = unpack(options, ints[0])
  tokens, _, at = lanes(rows, chunk)
  attend = attend_cached(options, cache[:, 0], rows, chunk)
  x, new = params["embed"][tokens], []
  *dense, _ = params["groups"]
  if dense:
    x, kv, _ = run_layers(
      config, options, {"groups": dense}, x, at, masked, attend, _no_exchange,
      lambda _, chosen: chosen,
    )  # fmt: skip
    new.append(kv)
  midway, kv = _attend(
    config, options, params, jnp.int32(0), x, at, masked, attend
  )
  return midway, jnp.concatenate([*new, kv[None]])


def go_on(
  config: ModelConfig,
  options: StepOptions,
  params: Tree,
  cache: jax.Array,
  masked: jax.Array,
  ints: jax.Array,
  layer: jax.Array,  # [] int32 MoE layer that begins
  x: jax.Array,
  gates: jax.Array,
  y: jax.Array,  # [N, k, D] outputs of the layer before
) -> tuple[Midway, jax.Array]:
  """Combines, then the next layer; its new KV [1, N, 2K, d]."""
  rows, chunk = unpack(options, ints[0])
  _, _, at = lanes(rows, chunk)
  attend = attend_cached(options, cache[:, 0], rows, chunk)
  x = combine(x, y, gates)
  midway, kv = _attend(config, options, params, layer, x, at, masked, attend)
  return midway, kv[None]


def finish(
  config: ModelConfig,
  options: StepOptions,
  params: Tree,
  ints: jax.Array,
  x: jax.Array,
  gates: jax.Array,
  y: jax.Array,
  new: tuple[jax.Array, ...],  # KV of the layers, as they came
) -> tuple[jax.Array, jax.Array]:
  """What `rank_step` returns: delta [L, 1, N, 2K, d], tokens [1, B + 1]."""
  rows, chunk = unpack(options, ints[0])
  x = combine(x, y, gates)
  sampled = sample_lanes(config, options, params, x, rows, chunk)
  return jnp.concatenate(new)[:, None], sampled[None]


def run_experts(
  config: ModelConfig,
  options: StepOptions,
  experts: Tree,  # [L_moe, 1, S, ...], see `params.describe`
  layer: jax.Array,  # [] int32
  rows: jax.Array,  # [M, D], as many as assignments; the rest is padding
  token: jax.Array,  # [M] int32
  slot: jax.Array,  # [M] int32; S: none
) -> jax.Array:
  """An expert rank's part of a layer: [M, D], unsummed."""
  held = jax.tree.map(lambda x: x[:, 0], experts)
  return kernel_of(config, options)(held, layer, rows, token, slot)


def _attend(
  config: ModelConfig, options: StepOptions, params: Tree, layer: jax.Array,
  x: jax.Array, at: jax.Array, masked: jax.Array, attend: Any,
) -> tuple[Midway, jax.Array]:  # fmt: skip
  """MoE layer number `layer` up to its experts."""
  group = params["groups"][-1]
  x, kv, h, (chosen, gates, _) = attend_layer(
    config, options, layer_of(group, layer), config.dense_layers + layer,
    x, turns(at, config), masked, attend,
  )  # fmt: skip
  return Midway(x, h, chosen, gates), kv


def _no_exchange(*args: Any) -> jax.Array:
  raise AssertionError(f"a dense layer has no experts: {len(args)} arguments")
