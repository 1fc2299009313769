"""The decoder's layers, once, for serving, scoring and training.

What differs between the three comes in as functions: how a layer attends
(over a cache or over the sequence) and how tokens reach the experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from resilient_moe.model.attention import Reach
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.dispatch import Exchange
from resilient_moe.model.experts import activation_of, mlp
from resilient_moe.model.products import (
  layer_of,
  matmul,
  row_block,
  widened,
)
from resilient_moe.model.projections import attention_output, queries_and_kv
from resilient_moe.model.rope import Turns, turns
from resilient_moe.model.router import route
from resilient_moe.model.rows import rms_norm, rowwise

# (layer [], q [N, H, w], kv [N, heads, w], reach) -> out [N, H, value]
Attend = Callable[[jax.Array, jax.Array, jax.Array, Reach], jax.Array]
# (MoE layer [], experts [N, k] int32) -> physical slots [N, k] int32
ToSlots = Callable[[jax.Array, jax.Array], jax.Array]


def run_layers(
  config: ModelConfig,
  options: StepOptions,
  params: dict[str, Any],
  x: jax.Array,  # [N, D]
  positions: jax.Array,  # [N] int32
  masked: jax.Array,  # [E] or [L_moe, E] bool, experts hidden from the gate
  attend: Attend,
  exchange: Exchange,
  to_slots: ToSlots,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Returns x [N, D], new KV [L, N, heads, w], router statistics."""
  by = turns(positions, config)
  new_kv, stats, first, first_moe = [], [], 0, 0
  for group in params["groups"]:
    n = group["mlp_norm"].shape[0]

    def body(
      x: jax.Array,
      index: jax.Array,
      group: Any = group,
      first: int = first,
      moe: int = first_moe,
    ) -> tuple[jax.Array, tuple]:
      layer = layer_of(group, index)
      hidden = masked if masked.ndim == 1 else masked[moe + index]
      x, kv, h, choice = attend_layer(
        config, options, layer, first + index, x, by, hidden, attend
      )
      if not choice:
        return x, (kv, {})
      chosen, gates, probabilities = choice
      y = exchange(
        params["experts"], moe + index, h, to_slots(moe + index, chosen)
      )
      return combine(x, y, gates), (
        kv,
        _statistics(config, chosen, probabilities),
      )

    index = jnp.arange(n, dtype=jnp.int32)
    x, (kv, stat) = jax.lax.scan(body, x, index)
    new_kv.append(kv)
    first += n
    if "moe" in group:
      stats.append(stat)
      first_moe += n
  if not stats:  # the dense layers before the experts, by themselves
    return x, jnp.concatenate(new_kv), {}
  joined = jax.tree.map(lambda *s: jnp.concatenate(s), *stats)
  return x, jnp.concatenate(new_kv), joined


def attend_layer(
  config: ModelConfig,
  options: StepOptions,
  layer: dict[str, Any],  # this layer's parameters, without experts
  index: jax.Array,  # [] int32 the layer's number
  x: jax.Array,  # [N, D]
  by: Turns,
  masked: jax.Array,  # [E] bool
  attend: Attend,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
  """A layer up to its experts.

  Returns x [N, D], new KV [N, heads, w], what the experts see [N, D], and the
  router's choice (`router.route`), () for a dense layer.
  """
  block = row_block(options, x)
  before = lambda w, r: _before_attention(config, options, w, *r)
  q, kv = rowwise(before, layer["attention"], (x, by), block)
  out = attend(index, q, kv, _reach(config, layer, index))
  after = lambda w, r: _after_attention(config, options, w, *r)
  x, h, choice = rowwise(after, (layer, masked), (x, out), block)
  return x, kv, h, choice


def _reach(
  config: ModelConfig, layer: dict[str, Any], index: jax.Array
) -> Reach:
  """What a layer's queries see; its window is data, so that one loop does."""
  window = None
  if any(config.windows):
    window = jnp.asarray(config.windows, jnp.int32)[index]
  latent = config.kv_rank if config.attention == "mla" else 0
  return Reach(latent, layer["attention"].get("sinks"), window)


def _before_attention(
  config: ModelConfig,
  options: StepOptions,
  w: dict,
  x: jax.Array,
  by: Turns,
) -> tuple[jax.Array, jax.Array]:
  h = rms_norm(x, w["norm"], config.norm_eps)
  return queries_and_kv(config, options, w, h, by)


def _after_attention(
  config: ModelConfig,
  options: StepOptions,
  w: tuple[dict, jax.Array],
  x: jax.Array,
  out: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
  """Projection, residual, norm; then the MLP, or the router's choice."""
  layer, masked = w
  dense = functools.partial(
    mlp, activation_of(config), matmul=functools.partial(matmul, options)
  )
  x = x + attention_output(config, options, layer["attention"], out)
  h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
  if "mlp" in layer:
    return x + dense(h, **layer["mlp"]), h, ()
  moe = layer["moe"]
  logits = matmul(
    options, h.astype(jnp.float32), widened(moe["router"])
  )
  if "router_bias" in moe:
    logits = logits + moe["router_bias"].astype(jnp.float32)[None, :]
  choice = route(config, logits, masked, moe.get("correction_bias"))
  if "shared" in moe:
    x = x + dense(h, **moe["shared"])
  return x, h, choice


def combine(x: jax.Array, y: jax.Array, gates: jax.Array) -> jax.Array:
  """Adds the k contributions in the router's order, [N, k, D] -> [N, D]."""
  total = y[:, 0].astype(jnp.float32) * gates[:, :1]
  for j in range(1, y.shape[1]):
    total = total + y[:, j].astype(jnp.float32) * gates[:, j : j + 1]
  return x + total.astype(x.dtype)


def _statistics(
  config: ModelConfig, chosen: jax.Array, probabilities: jax.Array
) -> dict[str, jax.Array]:
  """What the balance loss needs; dead code where nobody asks for it."""
  one_hot = chosen[:, :, None] == jnp.arange(config.n_experts)[None, None]
  load = one_hot.astype(jnp.float32).mean(axis=(0, 1))
  return {
    "expert_load": load,  # [E] fraction of assignments
    "router_probs_mean": probabilities.mean(axis=0),  # [E]
  }
