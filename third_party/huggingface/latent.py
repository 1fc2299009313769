"""Multi-head latent attention as DeepSeek stores it, and what V2 and V3 share.

Their files rotate pairs (2i, 2i + 1); the model rotates halves. Permuting the
rows that are rotated makes the one of the other: exactly for V3, and for V2
but for the order in which a dot product is summed.
"""

import functools
from typing import Any

import numpy as np

from resilient_moe.model.config import ModelConfig
from third_party.huggingface.decoder import decoder, dense_where
from third_party.huggingface.fields import Fields
from third_party.huggingface.layout import (
  Model,
  Part,
  Parts,
  bias,
  linear,
  norms,
  swiglu,
)
from third_party.huggingface.rope import latent_magnitude, read_rope


def latent_fields(fields: Fields, dtype: str) -> dict[str, Any]:
  """The fields of ModelConfig that V2 and V3 read in the same way."""
  sizes = decoder(fields)
  rank, nope = fields.size("kv_lora_rank"), fields.size("qk_nope_head_dim")
  rotated = fields.size("qk_rope_head_dim")
  # Said again under other names by files of the reference.
  fields.choose("num_key_value_heads", (sizes["n_heads"],), sizes["n_heads"])
  fields.choose("qk_head_dim", (nope + rotated,), nope + rotated)
  fields.choose("head_dim", (rotated,), rotated)
  fields.choose("moe_layer_freq", (1,), 1)
  width, rope = fields.size("moe_intermediate_size"), read_rope(fields)
  lead = fields.count("first_k_dense_replace", 0)
  dense = dense_where(list(range(lead)), sizes["n_layers"])
  dense_width = fields.size("intermediate_size")
  m = latent_magnitude(fields, rope.get("rope_factor", 1.0))
  return {
    **sizes, **rope, **dense,
    "n_experts": fields.size("n_routed_experts", also="num_experts"),
    "expert_width": width,
    "shared_width": width * fields.size("n_shared_experts"),
    "dense_width": dense_width if lead else 0,
    "attention": "mla",
    "attention_bias": fields.truth("attention_bias", False),
    "softmax_scale": 0.0 if m == 1 else (nope + rotated) ** -0.5 * m * m,
    "q_rank": fields.size("q_lora_rank", 0),
    "kv_rank": rank,
    "nope_dim": nope,
    "rope_dim": rotated,
    "value_dim": fields.size("v_head_dim"),
    "latent_norm_eps": 1e-6,  # of the reference, whatever rms_norm_eps is
    "router_scale": fields.number("routed_scaling_factor"),
    "dtype": dtype,
  }  # fmt: skip


def latent_model(
  config: ModelConfig, pairs: bool, after: int = 0
) -> Model:
  """How the tensors are laid out.

  Args:
    config: the model.
    pairs: whether pairs are rotated, not halves.
    after: layers behind the last one that predict further tokens; left out.
  """
  c = config

  def layer(i: int) -> Parts:
    prefix = f"model.layers.{i}"
    parts = norms(c, prefix) | _attention(c, f"{prefix}.self_attn", pairs)
    at = f"{prefix}.mlp"
    if c.is_dense(i):
      return parts | swiglu(at, c.d_model, c.dense_width, ("mlp",))
    parts["moe", "router"] = [linear(f"{at}.gate", c.n_experts, c.d_model)]
    if c.correction_bias:
      name = f"{at}.gate.e_score_correction_bias"
      parts["moe", "correction_bias"] = [Part(name, (c.n_experts,))]
    shared = ("moe", "shared")
    return parts | swiglu(
      f"{at}.shared_experts", c.d_model, c.shared_width, shared
    )

  def expert(i: int, e: int) -> Parts:
    prefix = f"model.layers.{i}.mlp.experts.{e}"
    return swiglu(prefix, c.d_model, c.expert_width)

  left_out = tuple(
    f"model.layers.{i}." for i in range(c.n_layers, c.n_layers + after)
  )
  return Model(config, layer, expert, lambda name: name.startswith(left_out))


def _attention(c: ModelConfig, at: str, pairs: bool) -> Parts:
  down, heads = c.kv_rank + c.rope_dim, c.n_heads * c.query_width
  both = c.n_heads * (c.nope_dim + c.value_dim)
  up = f"{at}.kv_b_proj.weight", (both, c.kv_rank), ()
  k_up = functools.partial(_up, c, False)
  v_up = functools.partial(_up, c, True)
  halve = functools.partial(_halves, c, pairs)
  kv = f"{at}.kv_a_proj_with_mqa"
  parts = {
    "kv_a": [Part(f"{kv}.weight", (down, c.d_model), (), halve)],
    "kv_a_norm": [Part(f"{at}.kv_a_layernorm.weight", (c.kv_rank,))],
    "k_up": [Part(*up, k_up)],
    "v_up": [Part(*up, v_up)],
    "out": [linear(f"{at}.o_proj", c.d_model, c.n_heads * c.value_dim)],
  }
  if c.attention_bias:
    parts["kv_a_bias"] = [Part(f"{kv}.bias", (down,), (), halve)]
    parts["out_bias"] = [bias(f"{at}.o_proj", c.d_model)]
  if not c.q_rank:
    name = f"{at}.q_proj.weight"
    parts["q"] = [Part(name, (heads, c.d_model), (), halve)]
  else:
    name = f"{at}.q_b_proj.weight"
    parts["q_a"] = [linear(f"{at}.q_a_proj", c.q_rank, c.d_model)]
    parts["q_a_norm"] = [Part(f"{at}.q_a_layernorm.weight", (c.q_rank,))]
    parts["q_b"] = [Part(name, (heads, c.q_rank), (), halve)]
    if c.attention_bias:
      parts["q_a_bias"] = [bias(f"{at}.q_a_proj", c.q_rank)]
  return {("attention", key): sources for key, sources in parts.items()}


def _halves(c: ModelConfig, pairs: bool, x: np.ndarray) -> np.ndarray:
  """Rows [heads * (kept | rotated), ...] -> columns, rotated as halves."""
  if pairs:
    heads = 1 if x.shape[0] == c.kv_rank + c.rope_dim else c.n_heads
    width = x.shape[0] // heads
    order = np.arange(width)
    rotated = order[width - c.rope_dim :]
    order = np.concatenate([
      order[: width - c.rope_dim], rotated[::2], rotated[1::2]
    ])  # fmt: skip
    x = x.reshape(heads, width, *x.shape[1:])[:, order].reshape(x.shape)
  return x.T


def _up(c: ModelConfig, values: bool, x: np.ndarray) -> np.ndarray:
  """[H * (nope + value), r] -> [H, nope, r], or [H, r, value]."""
  x = x.reshape(c.n_heads, c.nope_dim + c.value_dim, c.kv_rank)
  if values:
    return x[:, c.nope_dim :].swapaxes(1, 2)
  return x[:, : c.nope_dim]
