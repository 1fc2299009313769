"""The true shapes of public models: what their `config.json` says.

For planning and simulation, which need shapes and no weights. DeepSeek-V3's
multi-token-prediction module (layer 61 of the published files, 11.5 B of its
685 B numbers) is not part of a `ModelConfig` and left out. Published gpt-oss
weights are MXFP4 (about 4.25 bits a number of an expert); a `ModelConfig`
holds them as `dtype`.

Sources: `config.json` beside the published weights (mistralai/Mixtral-8x7B-
v0.1, Qwen/Qwen3-30B-A3B, Qwen/Qwen3-235B-A22B, allenai/OLMoE-1B-7B-0924,
deepseek-ai/DeepSeek-V2-Lite, deepseek-ai/DeepSeek-V3, openai/gpt-oss-20b,
openai/gpt-oss-120b).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.rope import yarn_magnitude


def _mixtral_8x7b() -> ModelConfig:
  return ModelConfig(
    vocab_size=32_000,
    n_layers=32,
    d_model=4096,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    n_experts=8,
    top_k=2,
    expert_width=14_336,
    rope_theta=1e6,
    norm_eps=1e-5,
    tied_embeddings=False,
  )


def _qwen3_30b_a3b() -> ModelConfig:
  return ModelConfig(
    vocab_size=151_936,
    n_layers=48,
    d_model=2048,
    n_heads=32,
    n_kv_heads=4,
    head_dim=128,
    n_experts=128,
    top_k=8,
    expert_width=768,
    qk_norm="head",
    rope_theta=1e6,
    tied_embeddings=False,
  )


def _qwen3_235b_a22b() -> ModelConfig:
  return dataclasses.replace(
    _qwen3_30b_a3b(),
    n_layers=94,
    d_model=4096,
    n_heads=64,
    expert_width=1536,
  )


def _olmoe_1b_7b() -> ModelConfig:
  return ModelConfig(
    vocab_size=50_304,
    n_layers=16,
    d_model=2048,
    n_heads=16,
    n_kv_heads=16,
    head_dim=128,
    n_experts=64,
    top_k=8,
    expert_width=1024,
    norm_topk_prob=False,
    qk_norm="projection",
    norm_eps=1e-5,
    tied_embeddings=False,
  )


def _deepseek(mscale: float, **others: Any) -> ModelConfig:
  """Latent attention and its rotary scaling, alike in V2-Lite and V3.

  `mscale` and `mscale_all_dim` are equal, so that cos and sin stay as they
  are and the scores are scaled.
  """
  stretch = yarn_magnitude(40.0, mscale)
  return ModelConfig(
    attention="mla",
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    softmax_scale=192**-0.5 * stretch * stretch,
    rope_scaling="yarn",
    rope_factor=40.0,
    rope_length=4096,
    tied_embeddings=False,
    **others,
  )


def _deepseek_v2_lite() -> ModelConfig:
  return _deepseek(
    mscale=0.707,
    vocab_size=102_400,
    n_layers=27,
    d_model=2048,
    n_heads=16,
    n_experts=64,
    top_k=6,
    expert_width=1408,
    shared_width=2 * 1408,
    dense_layers=1,
    dense_width=10_944,
    norm_topk_prob=False,
  )


def _deepseek_v3() -> ModelConfig:
  return _deepseek(
    mscale=1.0,
    vocab_size=129_280,
    n_layers=61,
    d_model=7168,
    n_heads=128,
    n_experts=256,
    top_k=8,
    expert_width=2048,
    shared_width=2048,
    dense_layers=3,
    dense_width=18_432,
    router="sigmoid_topk",
    correction_bias=True,
    router_scale=2.5,
    expert_groups=8,
    top_groups=4,
    group_score="top2",
    q_rank=1536,
  )


def _gpt_oss(n_layers: int, n_experts: int) -> ModelConfig:
  """A window of 128 in every other layer, the first one included."""
  return ModelConfig(
    vocab_size=201_088,
    n_layers=n_layers,
    d_model=2880,
    n_heads=64,
    n_kv_heads=8,
    head_dim=64,
    n_experts=n_experts,
    top_k=4,
    expert_width=2880,
    router="topk_softmax",
    router_bias=True,
    expert_bias=True,
    activation="clamped_swiglu",
    attention_bias=True,
    sinks=True,
    windows=tuple(0 if layer % 2 else 128 for layer in range(n_layers)),
    rope_theta=150_000.0,
    rope_scaling="yarn",
    rope_factor=32.0,
    rope_length=4096,
    rope_truncate=False,
    rope_magnitude=yarn_magnitude(32.0),
    norm_eps=1e-5,
    tied_embeddings=False,
  )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
  "mixtral-8x7b": _mixtral_8x7b,
  "qwen3-30b-a3b": _qwen3_30b_a3b,
  "qwen3-235b-a22b": _qwen3_235b_a22b,
  "olmoe-1b-7b": _olmoe_1b_7b,
  "deepseek-v2-lite": _deepseek_v2_lite,
  "deepseek-v3": _deepseek_v3,
  "gpt-oss-20b": lambda: _gpt_oss(24, 32),
  "gpt-oss-120b": lambda: _gpt_oss(36, 128),
}


def preset(name: str, dtype: str = "bfloat16") -> ModelConfig:
  """The config of a public model.

  Raises:
    ValueError: unknown name; lists the names.
  """
  if name not in PRESETS:
    raise ValueError(f"preset {name!r}: choose one of {', '.join(PRESETS)}")
  return dataclasses.replace(PRESETS[name](), dtype=dtype)
