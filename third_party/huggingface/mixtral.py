"""Mixtral (mistral.ai, arXiv 2401.04088)."""

from typing import Any

from resilient_moe.model.config import ModelConfig
from third_party.huggingface.decoder import (
  decoder,
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

ARCHITECTURE, MODEL_TYPE = "MixtralForCausalLM", "mixtral"


def read(fields: Fields, dtype: str) -> Model:
  """The model of a config.json."""
  sizes = decoder(fields)
  window = fields.size("sliding_window", 0)
  config = make_config(fields, {
    **sizes, **grouped_heads(fields, sizes), **read_rope(fields),
    "n_experts": fields.size("num_local_experts", also="num_experts"),
    "expert_width": fields.size("intermediate_size"),
    "norm_topk_prob": True,
    "windows": windows(window, sizes["n_layers"]),
    "dtype": dtype,
  })  # fmt: skip
  return model(config)


def model(config: ModelConfig) -> Model:
  """How its tensors are laid out."""
  c = config

  def layer(i: int) -> Parts:
    prefix = f"model.layers.{i}"
    gate = linear(f"{prefix}.block_sparse_moe.gate", c.n_experts, c.d_model)
    return grouped_attention(c, prefix) | {("moe", "router"): [gate]}

  def expert(i: int, e: int) -> Parts:
    prefix = f"model.layers.{i}.block_sparse_moe.experts.{e}"
    names = ("w1", "w3", "w2")
    return swiglu(prefix, c.d_model, c.expert_width, (), names)

  return Model(config, layer, expert)


def write(config: ModelConfig) -> dict[str, Any]:
  """The fields of a config.json, as far as the family has them."""
  c = config
  return {
    "hidden_size": c.d_model,
    "intermediate_size": c.expert_width,
    "num_hidden_layers": c.n_layers,
    "num_attention_heads": c.n_heads,
    "num_key_value_heads": c.n_kv_heads,
    "head_dim": c.head_dim,
    "num_local_experts": c.n_experts,
    "num_experts_per_tok": c.top_k,
    "sliding_window": c.windows[0] if c.windows and c.windows[0] else None,
    "rope_parameters": write_rope(c),
  }
