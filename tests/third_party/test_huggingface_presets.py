"""The presets are what the loader reads from the published config.json."""

import dataclasses

import pytest

from resilient_moe.model.presets import preset
from third_party import huggingface as hf
from third_party.huggingface.fields import Fields

_YARN = {
  "beta_fast": 32, "beta_slow": 1, "factor": 40, "type": "yarn",
  "original_max_position_embeddings": 4096,
}  # fmt: skip
# What changes the numbers, as the published files say it.
PUBLISHED = {
  "mixtral-8x7b": ("Mixtral", {
    "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
    "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
    "tie_word_embeddings": False,
  }),
  "qwen3-30b-a3b": ("Qwen3Moe", {
    "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48,
    "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 1e6, "use_sliding_window": False, "vocab_size": 151936,
  }),
  "olmoe-1b-7b": ("Olmoe", {
    "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
    "intermediate_size": 1024, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "vocab_size": 50304,
  }),
  "deepseek-v2-lite": ("DeepseekV2", {
    "first_k_dense_replace": 1, "hidden_size": 2048,
    "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1,
    "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
  }),
  "deepseek-v3": ("DeepseekV3", {
    "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
  }),
  "gpt-oss-20b": ("GptOss", {
    "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
    "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "rope_scaling": {
      "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
      "original_max_position_embeddings": 4096, "rope_type": "yarn",
      "truncate": False,
    },
    "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
  }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_the_published_config_says(name):
  family, values = PUBLISHED[name]
  fields = Fields(name, values)
  read = hf.FAMILIES[f"{family}ForCausalLM"].read(fields, "float32")
  fields.finish()
  wanted = dataclasses.asdict(preset(name))
  assert dataclasses.asdict(read.config) == {**wanted, "dtype": "float32"}
