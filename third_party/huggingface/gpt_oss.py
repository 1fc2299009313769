"""gpt-oss (openai.com, arXiv 2508.10925).

Its experts are fused on disk, [E, in, out], with the gate's and the up
projection's columns taking turns; the published files hold them in MXFP4.
"""

import numpy as np

from resilient_moe.model.config import ModelConfig
from third_party.huggingface.decoder import (
  decoder,
  grouped_heads,
  make_config,
)
from third_party.huggingface.fields import Fields
from third_party.huggingface.layout import (
  Model,
  Part,
  Parts,
  bias,
  grouped_attention,
  linear,
)
from third_party.huggingface.quantized import MXFP4
from third_party.huggingface.rope import read_rope

ARCHITECTURE, MODEL_TYPE = "GptOssForCausalLM", "gpt_oss"
QUANTIZATIONS = (MXFP4,)
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read(fields: Fields, dtype: str) -> Model:
  """The model of a config.json."""
  sizes = decoder(fields)
  fields.choose("experts_per_token", (sizes["top_k"],), sizes["top_k"])
  fields.take("initial_context_length", None)  # said again in the scaling
  config = make_config(fields, {
    **sizes, **grouped_heads(fields, sizes), **read_rope(fields),
    "n_experts": fields.size("num_local_experts", also="num_experts"),
    "expert_width": fields.size("intermediate_size"),
    "router": "topk_softmax", "router_bias": True, "norm_topk_prob": True,
    "expert_bias": True, "sinks": True,
    "attention_bias": fields.truth("attention_bias", True),
    "activation": "clamped_swiglu",
    "swiglu_limit": fields.number("swiglu_limit", 7.0),
    "swiglu_alpha": fields.number("swiglu_alpha", 1.702),
    "windows": _windows(fields, sizes["n_layers"]),
    "dtype": dtype,
  })  # fmt: skip
  return model(config)


def _windows(fields: Fields, n_layers: int) -> tuple[int, ...]:
  """Every other layer sees only the last positions, unless told otherwise."""
  turns = [_FULL if i % 2 else _SLIDING for i in range(n_layers)]
  kinds = fields.take("layer_types", turns)
  if len(kinds) != n_layers or not set(kinds) <= {_SLIDING, _FULL}:
    raise fields.error(
      "layer_types", kinds, f"needed is one for each of {n_layers} layers, of "
      f"{_SLIDING}, {_FULL}",
    )  # fmt: skip
  fields.take("sliding_window", None)
  if _SLIDING not in kinds:
    return ()
  window = fields.size("sliding_window")
  return tuple(window if kind == _SLIDING else 0 for kind in kinds)


def model(config: ModelConfig) -> Model:
  """How its tensors are laid out."""
  c = config
  d, e, f = c.d_model, c.n_experts, c.expert_width

  def layer(i: int) -> Parts:
    prefix = f"model.layers.{i}"
    sinks = Part(f"{prefix}.self_attn.sinks", (c.n_heads,))
    router = f"{prefix}.mlp.router"
    return grouped_attention(c, prefix) | {
      ("attention", "sinks"): [sinks],
      ("moe", "router"): [linear(router, e, d)],
      ("moe", "router_bias"): [bias(router, e)],
    }

  def expert(i: int, which: int) -> Parts:
    at = f"model.layers.{i}.mlp.experts"
    each = {
      "gate_up": Part(f"{at}.gate_up_proj", (e, d, 2 * f), (), _side_by_side),
      "gate_up_bias": Part(
        f"{at}.gate_up_proj_bias", (e, 2 * f), (), _side_by_side
      ),
      "down": Part(f"{at}.down_proj", (e, f, d)),
      "down_bias": Part(f"{at}.down_proj_bias", (e, d)),
    }
    return {
      (name,): [Part(p.name, p.shape, p.where, p.turn, which)]
      for name, p in each.items()
    }

  return Model(config, layer, expert)


def _side_by_side(x: np.ndarray) -> np.ndarray:
  """Columns in turn, gate and up -> the gate's, then the up projection's."""
  return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
