"""Tiny models that between them make every choice of the public families.

The families themselves, against the reference, are in `tests/third_party`.
"""

import dataclasses

from resilient_moe.model import ModelConfig

_SIZES = {
  "vocab_size": 96, "n_layers": 3, "d_model": 32, "n_heads": 4,
  "n_kv_heads": 2, "head_dim": 8, "n_experts": 8, "top_k": 3,
  "expert_width": 24,
}  # fmt: skip
_LATENT = {
  "attention": "mla", "kv_rank": 16, "nope_dim": 6, "rope_dim": 4,
  "value_dim": 8, "shared_width": 16, "dense_layers": 1, "dense_width": 40,
  "expert_groups": 4, "top_groups": 2, "router_scale": 2.5,
}  # fmt: skip
_YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_length": 16}

SIGMOID = ModelConfig(  # as DeepSeek-V3
  **_SIZES, **_LATENT, **_YARN, q_rank=12, router="sigmoid_topk",
  correction_bias=True, group_score="top2", attention_bias=True,
  rope_magnitude=1.2, softmax_scale=0.4,
)  # fmt: skip
LATENT = ModelConfig(**_SIZES, **_LATENT, norm_topk_prob=False)  # as V2
SINKS = ModelConfig(  # as gpt-oss
  **_SIZES, **_YARN, router="topk_softmax", router_bias=True, sinks=True,
  windows=(7, 0, 7), attention_bias=True, activation="clamped_swiglu",
  swiglu_limit=0.7, expert_bias=True, rope_truncate=False,
)  # fmt: skip
NORMS = ModelConfig(  # as Qwen3-MoE, a dense layer between the others
  **_SIZES, qk_norm="head", dense_at=(1,), dense_width=40,
  rope_scaling="llama3", rope_factor=8.0, rope_length=32,
  tied_embeddings=False,
)  # fmt: skip
CLIPPED = ModelConfig(  # as OLMoE
  **_SIZES, qk_norm="projection", qkv_clip=0.6, norm_topk_prob=False,
  rope_scaling="linear", rope_factor=3.0,
)  # fmt: skip
FAMILIES = {
  "sigmoid": SIGMOID, "latent": LATENT, "sinks": SINKS, "norms": NORMS,
  "clipped": CLIPPED,
}  # fmt: skip


def narrow(config: ModelConfig) -> ModelConfig:
  """In bfloat16."""
  return dataclasses.replace(config, dtype="bfloat16")
