"""What a model's config may say: one clear error for each way it can't be."""

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from resilient_moe.model.config import ModelConfig

_CHOICES = {
  "router": ("softmax_topk", "sigmoid_topk", "topk_softmax"),
  "attention": ("gqa", "mla"),
  "qk_norm": ("none", "head", "projection"),
  "rope_scaling": ("none", "linear", "llama3", "yarn"),
  "group_score": ("max", "top2"),
  "activation": ("swiglu", "clamped_swiglu"),
  "dtype": ("float32", "bfloat16"),
}
_MAY_BE_ZERO = (
  "shared_width", "dense_layers", "dense_width", "q_rank", "kv_rank",
  "nope_dim", "rope_dim", "value_dim", "rope_length", "qkv_clip",
  "softmax_scale",
)  # fmt: skip


def choose(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError where a value is not one of the choices."""
  if value not in choices:
    raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def check_model(c: "ModelConfig") -> None:
  """Raises ValueError naming the field, its value, the limit or choices."""
  for name, choices in _CHOICES.items():
    choose(name, getattr(c, name), choices)
  _check_numbers(c)
  _check_attention(c)
  _check_rope(c)
  _check_experts(c)
  _check_layers(c)


def _check_numbers(c: "ModelConfig") -> None:
  for field in dataclasses.fields(c):
    value = getattr(c, field.name)
    minimum = 0 if field.name in _MAY_BE_ZERO else 1
    if field.type is int and value < minimum:
      raise ValueError(f"{field.name}={value}: at least {minimum}")
    if field.type is not float:
      continue
    low = value >= 0 if field.name in _MAY_BE_ZERO else value > 0
    if not (low and math.isfinite(value)):
      bound = "0 or more" if field.name in _MAY_BE_ZERO else "above 0"
      raise ValueError(f"{field.name}={value}: finite and {bound}")


def _check_attention(c: "ModelConfig") -> None:
  if c.attention == "mla":
    for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
      if not getattr(c, name):
        raise ValueError(f"{name}=0: at least 1 with attention='mla'")
    if c.rope_dim % 2:
      raise ValueError(f"rope_dim={c.rope_dim}: even, for RoPE")
    if c.qk_norm != "none" or c.qkv_clip:
      raise ValueError(
        f"qk_norm={c.qk_norm!r}, qkv_clip={c.qkv_clip}: 'none' and 0 "
        "with attention='mla', which normalises its latents"
      )
    return
  if c.n_heads % c.n_kv_heads:
    raise ValueError(
      f"n_heads={c.n_heads}: a multiple of n_kv_heads={c.n_kv_heads}"
    )
  if c.head_dim % 2:
    raise ValueError(f"head_dim={c.head_dim}: even, for RoPE")
  for name in ("q_rank", "kv_rank", "nope_dim", "rope_dim", "value_dim"):
    if getattr(c, name):
      raise ValueError(
        f"{name}={getattr(c, name)}: 0 with attention='gqa'"
      )


def _check_rope(c: "ModelConfig") -> None:
  if c.rope_scaling == "none" and c.rope_factor != 1:
    raise ValueError(
      f"rope_factor={c.rope_factor}: 1 with rope_scaling='none'"
    )
  if c.rope_scaling in ("llama3", "yarn") and not c.rope_length:
    raise ValueError(
      f"rope_length=0: at least 1 with rope_scaling={c.rope_scaling!r}"
    )
  if c.rope_low >= c.rope_high:
    raise ValueError(
      f"rope_low={c.rope_low}: below rope_high={c.rope_high}"
    )


def _check_experts(c: "ModelConfig") -> None:
  groups, each = c.expert_groups, c.n_experts // c.expert_groups
  if c.n_experts % groups:
    raise ValueError(
      f"expert_groups={groups}: a divisor of n_experts={c.n_experts}"
    )
  if c.top_groups > groups:
    raise ValueError(
      f"top_groups={c.top_groups}: at most expert_groups={groups}"
    )
  if c.top_k > c.top_groups * each:
    where = f" in top_groups={c.top_groups}" if groups > 1 else ""
    raise ValueError(
      f"top_k={c.top_k}: at most n_experts={c.top_groups * each}"
      f"{where}"
    )
  if groups > 1 and c.group_score == "top2" and each < 2:
    raise ValueError(
      f"expert_groups={groups}: groups of at least 2 experts with "
      f"group_score='top2'; n_experts={c.n_experts}"
    )
  if c.router == "topk_softmax" and (groups > 1 or c.correction_bias):
    raise ValueError(
      "router='topk_softmax': with expert_groups=1 and no correction_bias"
    )


def _check_layers(c: "ModelConfig") -> None:
  if c.dense_layers > c.n_layers:
    raise ValueError(
      f"dense_layers={c.dense_layers}: at most n_layers={c.n_layers}"
    )
  allowed = range(c.dense_layers, c.n_layers)
  if list(c.dense_at) != sorted(set(c.dense_at) & set(allowed)):
    raise ValueError(
      f"dense_at={c.dense_at}: ascending layers from dense_layers="
      f"{c.dense_layers} to n_layers - 1={c.n_layers - 1}"
    )
  if (c.dense_layers or c.dense_at) and not c.dense_width:
    raise ValueError("dense_width=0: at least 1 where there are dense_layers")
  if c.windows and len(c.windows) != c.n_layers:
    raise ValueError(
      f"windows={c.windows}: one a layer, n_layers={c.n_layers}"
    )
  if not c.moe_layers:
    raise ValueError(
      f"dense_layers={c.dense_layers}, dense_at={c.dense_at}: at least one of "
      f"n_layers={c.n_layers} has experts"
    )
  if min(c.windows, default=0) < 0:
    raise ValueError(f"windows={c.windows}: at least 0, which means all")
