"""From the residual stream to queries and cached tokens, and back.

Grouped queries (GQA) cache a token's keys and values side by side, [2K, d].
Multi-head latent attention (MLA; DeepSeek-V2, section 2.1) caches one latent
and one rotated key for all heads, [1, kv_rank + rope_dim]. Its up projections
are absorbed: into the queries, which are taken to the latents' space, and into
what was attended, which is taken out of it. So the cache is never expanded,
in decode and prefill alike, and both have the same bits.
"""

from typing import Any

import jax
import jax.numpy as jnp

from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.products import matmul, per_head
from resilient_moe.model.rope import Turns, rope
from resilient_moe.model.rows import rms_norm

Weights = dict[str, Any]  # of one layer's attention


def queries_and_kv(
  config: ModelConfig,
  options: StepOptions,
  w: Weights,
  h: jax.Array,
  by: Turns,
) -> tuple[jax.Array, jax.Array]:
  """Normed x [N, D] -> q [N, H, w] (scaled, rotated), kv [N, heads, w].

  `heads` and `w` are what a cached token has: `config.kv_heads`, `kv_width`.
  """
  project = _latent if config.attention == "mla" else _grouped
  q, kv = project(config, options, w, h, by)
  scale = config.softmax_scale or config.query_width**-0.5
  return (q.astype(jnp.float32) * scale).astype(q.dtype), kv


def attention_output(
  config: ModelConfig, options: StepOptions, w: Weights, out: jax.Array
) -> jax.Array:
  """What was attended [N, H, width of a value] -> [N, D]."""
  if config.attention == "mla":
    out = per_head(options, out, w["v_up"])
  return _linear(options, out.reshape(out.shape[0], -1), w, "out")


def _grouped(
  c: ModelConfig,
  options: StepOptions,
  w: Weights,
  h: jax.Array,
  by: Turns,
) -> tuple[jax.Array, jax.Array]:
  qkv = _linear(options, h, w, "qkv")
  ends = [c.n_heads * c.head_dim, (c.n_heads + c.n_kv_heads) * c.head_dim]
  q, k, v = jnp.split(qkv, ends, axis=1)
  heads = lambda x: x.reshape(x.shape[0], -1, c.head_dim)
  if c.qk_norm == "projection":
    q = rms_norm(q, w["q_norm"], c.norm_eps)
    k = rms_norm(k, w["k_norm"], c.norm_eps)
  q, k, v = heads(q), heads(k), heads(v)
  if c.qk_norm == "head":
    q = rms_norm(q, w["q_norm"], c.norm_eps)
    k = rms_norm(k, w["k_norm"], c.norm_eps)
  if c.qkv_clip:
    q, k, v = (jnp.clip(x, -c.qkv_clip, c.qkv_clip) for x in (q, k, v))
  k = rope(k, by)
  return rope(q, by), jnp.concatenate([k, v], axis=1)


def _latent(
  c: ModelConfig,
  options: StepOptions,
  w: Weights,
  h: jax.Array,
  by: Turns,
) -> tuple[jax.Array, jax.Array]:
  if c.q_rank:
    compressed = _linear(options, h, w, "q_a")
    compressed = rms_norm(compressed, w["q_a_norm"], c.latent_norm_eps)
    q = matmul(options, compressed, w["q_b"])
  else:
    q = matmul(options, h, w["q"])
  q = q.reshape(q.shape[0], c.n_heads, c.query_width)
  content = per_head(options, q[..., : c.nope_dim], w["k_up"])
  turned = rope(q[..., c.nope_dim :], by)
  kv = _linear(options, h, w, "kv_a")
  latent = rms_norm(kv[:, : c.kv_rank], w["kv_a_norm"], c.latent_norm_eps)
  key = rope(kv[:, None, c.kv_rank :], by)
  return (
    jnp.concatenate([content, turned], axis=-1),
    jnp.concatenate([latent[:, None], key], axis=-1),
  )


def _linear(
  options: StepOptions, x: jax.Array, w: Weights, name: str
) -> jax.Array:
  y = matmul(options, x, w[name])
  bias = w.get(f"{name}_bias")
  return y if bias is None else y + bias[None, :]
