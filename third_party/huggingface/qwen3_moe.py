"""Qwen3-MoE (arXiv 2505.09388)."""

from typing import Any

from resilient_moe.model.config import ModelConfig
from third_party.huggingface.decoder import (
  decoder,
  dense_where,
  grouped_heads,
  make_config,
  windows,
)
from third_party.huggingface.fields import Fields
from third_party.huggingface.layout import (
  Model,
  Parts,
  grouped_attention,
  linear,
  swiglu,
)
from third_party.huggingface.rope import read_rope, write_rope

ARCHITECTURE, MODEL_TYPE = "Qwen3MoeForCausalLM", "qwen3_moe"


def read(fields: Fields, dtype: str) -> Model:
  """The model of a config.json."""
  sizes = decoder(fields)
  dense = dense_where(_without_experts(fields, sizes), sizes["n_layers"])
  width = fields.size("intermediate_size")
  config = make_config(fields, {
    **sizes, **grouped_heads(fields, sizes), **read_rope(fields), **dense,
    "n_experts": fields.size("num_experts", also="num_local_experts"),
    "expert_width": fields.size("moe_intermediate_size"),
    "dense_width": width if any(dense.values()) else 0,
    "norm_topk_prob": fields.truth("norm_topk_prob"),
    "attention_bias": fields.truth("attention_bias", False),
    "qk_norm": "head",
    "windows": windows(_window(fields), sizes["n_layers"]),
    "dtype": dtype,
  })  # fmt: skip
  return model(config)


def _without_experts(fields: Fields, sizes: dict[str, Any]) -> list[int]:
  """The layers that have an MLP instead."""
  step = fields.size("decoder_sparse_step", 1)
  only, n = fields.take("mlp_only_layers", []), sizes["n_layers"]
  if not isinstance(only, list) or not set(only) <= set(range(n)):
    raise fields.error(
      "mlp_only_layers", only, f"needed are layers from 0 to {n - 1}"
    )
  return [i for i in range(n) if i in only or (i + 1) % step]


def _window(fields: Fields) -> int:
  fields.take("sliding_window", None)
  last = fields.take("max_window_layers", None)
  if not fields.truth("use_sliding_window", False):
    return 0
  if last is not None:
    raise fields.error(
      "max_window_layers", last, "with use_sliding_window=true the reference "
      "and the model's own code differ; supported: null",
    )  # fmt: skip
  return fields.size("sliding_window")


def model(config: ModelConfig) -> Model:
  """How its tensors are laid out."""
  c = config

  def layer(i: int) -> Parts:
    prefix = f"model.layers.{i}"
    parts = grouped_attention(c, prefix)
    if c.is_dense(i):
      mlp = swiglu(f"{prefix}.mlp", c.d_model, c.dense_width, ("mlp",))
      return parts | mlp
    gate = linear(f"{prefix}.mlp.gate", c.n_experts, c.d_model)
    return parts | {("moe", "router"): [gate]}

  def expert(i: int, e: int) -> Parts:
    prefix = f"model.layers.{i}.mlp.experts.{e}"
    return swiglu(prefix, c.d_model, c.expert_width)

  return Model(config, layer, expert)


def write(config: ModelConfig) -> dict[str, Any]:
  """The fields of a config.json, as far as the family has them."""
  c = config
  window = c.windows[0] if c.windows else 0
  return {
    "hidden_size": c.d_model,
    "intermediate_size": c.dense_width or c.expert_width,
    "moe_intermediate_size": c.expert_width,
    "num_hidden_layers": c.n_layers,
    "num_attention_heads": c.n_heads,
    "num_key_value_heads": c.n_kv_heads,
    "head_dim": c.head_dim,
    "num_experts": c.n_experts,
    "num_experts_per_tok": c.top_k,
    "norm_topk_prob": c.norm_topk_prob,
    "attention_bias": c.attention_bias,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [i for i in range(c.n_layers) if c.is_dense(i)],
    "use_sliding_window": bool(window),
    "sliding_window": window or None,
    "rope_parameters": write_rope(c),
  }
