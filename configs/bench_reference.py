"""Decode and prefill against `transformers`, as ratios within one run.

  python -m experiments.bench_reference --config=configs/bench_reference.py \
      --workdir=runs/bench_reference

A Qwen3-MoE of 8 layers, width 512, 32 experts, top 4, with random weights in
float32, on this machine's cores. Expected on 2 idle cores: about 3 minutes.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The model and loads of the comparison."""
  config = ml_collections.ConfigDict()
  config.model = {  # arguments of `transformers.Qwen3MoeConfig`
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "intermediate_size": 1024,  # of dense layers; there are none
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
  }
  config.seed = 0
  config.threads = 2  # of torch; JAX takes the machine's cores
  config.batches = "1,16,64"
  config.context = 256  # tokens before a decode block
  config.block_steps = 8
  config.prefills = "512,2048"
  config.chunk = 512  # prompt tokens of one of our steps
  config.prefill_rows = 16  # decode rows of the engine that prefills; idle
  config.pairs = 8  # alternating blocks of a case
  config.tries = 3  # calls of each of the reference's settings
  config.experts_implementations = "grouped_mm,eager,batched_mm"
  # `batched_mm` copies its experts' weights for every row: 6 MB each here.
  config.batched_rows = 64
  config.caches = "static,dynamic"
  config.targets = {"decode, batch 16": 1.5, "prefill, 512 tokens": 1.0}
  # Experts held while only the least number may be chosen.
  config.scaling_experts = "8,32,128"
  config.scaling_rows = 16
  config.scaling_chunk = 512
  return config
