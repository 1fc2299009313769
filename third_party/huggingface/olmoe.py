"""OLMoE (arXiv 2409.02060)."""

from resilient_moe.model.config import ModelConfig
from third_party.huggingface.decoder import (
  decoder,
  grouped_heads,
  make_config,
)
from third_party.huggingface.fields import Fields
from third_party.huggingface.layout import (
  Model,
  Parts,
  grouped_attention,
  linear,
  swiglu,
)
from third_party.huggingface.rope import read_rope

ARCHITECTURE, MODEL_TYPE = "OlmoeForCausalLM", "olmoe"


def read(fields: Fields, dtype: str) -> Model:
  """The model of a config.json."""
  sizes = decoder(fields)
  clip = 0.0
  if fields.take("clip_qkv", None) is not None:
    clip = fields.number("clip_qkv")
  config = make_config(fields, {
    **sizes, **grouped_heads(fields, sizes), **read_rope(fields),
    "n_experts": fields.size("num_experts", also="num_local_experts"),
    "expert_width": fields.size("intermediate_size"),
    "norm_topk_prob": fields.truth("norm_topk_prob"),
    "attention_bias": fields.truth("attention_bias", False),
    "qk_norm": "projection",
    "qkv_clip": clip,
    "dtype": dtype,
  })  # fmt: skip
  return model(config)


def model(config: ModelConfig) -> Model:
  """How its tensors are laid out."""
  c = config

  def layer(i: int) -> Parts:
    prefix = f"model.layers.{i}"
    gate = linear(f"{prefix}.mlp.gate", c.n_experts, c.d_model)
    return grouped_attention(c, prefix) | {("moe", "router"): [gate]}

  def expert(i: int, e: int) -> Parts:
    prefix = f"model.layers.{i}.mlp.experts.{e}"
    return swiglu(prefix, c.d_model, c.expert_width)

  return Model(config, layer, expert)
