"""Tiny random models of the reference, `transformers`, on disk.

Every parameter and buffer is drawn at random, norms and biases too: what is
left at 0 or 1 tests nothing.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WHY = "needs torch and transformers: make test, or pip install .[reference]"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

# The same sizes in all: few programs to compile, few bytes to write.
COMMON = {
  "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
  "intermediate_size": 24, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
  "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
  "eos_token_id": None,
}  # fmt: skip
YARN = {
  "rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0,
  "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5_000.0}
LLAMA3 = {
  "rope_type": "llama3", "factor": 8.0, "rope_theta": 10_000.0,
  "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}  # fmt: skip
_MLA = {
  "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_rope_head_dim": 6,
  "qk_nope_head_dim": 4, "v_head_dim": 7, "moe_intermediate_size": 12,
  "n_routed_experts": 8, "n_shared_experts": 2, "routed_scaling_factor": 1.5,
  "first_k_dense_replace": 1, "q_lora_rank": 10, "num_experts_per_tok": 3,
}  # fmt: skip
DEEPSEEK_YARN = {**YARN, "mscale": 0.8, "mscale_all_dim": 0.7}

# name -> (family, what is not as in COMMON)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "mixtral": ("Mixtral", {"num_local_experts": 8}),
  "mixtral_window": ("Mixtral", {
    "num_local_experts": 4, "sliding_window": 7, "rope_parameters": LINEAR,
    "tie_word_embeddings": True,
  }),
  "qwen3": ("Qwen3Moe", {
    "num_experts": 8, "moe_intermediate_size": 12, "norm_topk_prob": True,
    "attention_bias": True, "mlp_only_layers": [1],
    "rope_parameters": YARN,
  }),
  "qwen3_sparse": ("Qwen3Moe", {
    "num_experts": 8, "moe_intermediate_size": 12, "norm_topk_prob": False,
    "decoder_sparse_step": 2, "head_dim": 12, "use_sliding_window": True,
    "sliding_window": 5, "rope_parameters": LLAMA3,
    "num_hidden_layers": 4, "tie_word_embeddings": True,
  }),
  "olmoe": ("Olmoe", {
    "num_experts": 8, "intermediate_size": 12, "clip_qkv": 0.6,
    "norm_topk_prob": False, "attention_bias": True,
  }),
  "olmoe_norm": ("Olmoe", {
    "num_experts": 8, "intermediate_size": 12, "norm_topk_prob": True,
    "num_key_value_heads": 4, "rope_parameters": YARN,
  }),
  "deepseek_v2": ("DeepseekV2", {
    **_MLA, "q_lora_rank": None, "rope_parameters": DEEPSEEK_YARN,
  }),
  "deepseek_v2_groups": ("DeepseekV2", {
    **_MLA, "topk_method": "group_limited_greedy", "n_group": 4,
    "topk_group": 2, "attention_bias": True, "n_shared_experts": 1,
  }),
  "deepseek_v3": ("DeepseekV3", {
    **_MLA, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    "rope_parameters": DEEPSEEK_YARN, "n_shared_experts": 1,
    "num_mtp_layers": 0,
  }),
  "deepseek_v3_half": ("DeepseekV3", {
    **_MLA, "n_group": 2, "topk_group": 1, "norm_topk_prob": False,
    "rope_interleave": False, "attention_bias": True, "q_lora_rank": None,
    "first_k_dense_replace": 0, "num_mtp_layers": 0,
  }),
  "gpt_oss": ("GptOss", {
    "num_local_experts": 8, "sliding_window": 6, "num_hidden_layers": 4,
    "rope_parameters": {**YARN, "truncate": False, "beta_fast": 16.0},
  }),
  "gpt_oss_full": ("GptOss", {
    "num_local_experts": 4, "sliding_window": 9, "attention_bias": False,
    "layer_types": [
      "full_attention", "full_attention", "sliding_attention",
    ],
    "rope_parameters": {"rope_type": "default", "rope_theta": 150_000.0},
    "swiglu_limit": 1.5, "tie_word_embeddings": True,
  }),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reference:
  """A model of the reference, and the folder that it was saved to."""

  model: Any
  folder: pathlib.Path

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """[B, T] -> [B, T, V]."""
    with torch.no_grad():
      return self.model(torch.tensor(tokens)).logits.numpy()

  def layers(self, tokens: np.ndarray) -> list[np.ndarray]:
    """What goes into each layer, and what the last norm makes of it."""
    with torch.no_grad():
      out = self.model(torch.tensor(tokens), output_hidden_states=True)
    return [h.numpy() for h in out.hidden_states]

  def generate(self, prompts: np.ndarray, count: int) -> np.ndarray:
    """Greedy tokens behind prompts [n, T]: [n, count]."""
    ids = torch.tensor(prompts, dtype=torch.long)
    with torch.no_grad():
      out = self.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
        min_new_tokens=count, do_sample=False,
      )  # fmt: skip
    return out[:, prompts.shape[1] :].numpy()


def make(
  name: str, folder: pathlib.Path, seed: int = 0, **changes: Any
) -> Reference:
  """A random model of a case, saved in shards of a few kilobytes."""
  family, own = CASES[name]
  values = {**COMMON, **own, **changes}
  if "kv_lora_rank" in values:
    del values["head_dim"]  # that of the rotated part, which has a name
  config = getattr(transformers, f"{family}Config")(**values)
  config._attn_implementation = "eager"
  config._experts_implementation = "eager"
  torch.manual_seed(seed)
  model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  randomise(model, config.tie_word_embeddings)
  with quiet():
    model.save_pretrained(folder, max_shard_size="40KB")
  return Reference(model, folder)


def randomise(model: Any, tied: bool) -> None:
  """Random values of a size that keeps every layer's part visible."""
  with torch.no_grad():
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
      if name.endswith(("inv_freq", "original_inv_freq")):
        continue
      if "norm" in name:
        x.copy_(1 + 0.3 * torch.randn_like(x))
      elif x.ndim == 1 or name.endswith("bias"):
        x.copy_(0.3 * torch.randn_like(x))
      elif "embed" in name:
        x.copy_((0.2 if tied else 1) * torch.randn_like(x))
      else:
        x.copy_(torch.randn_like(x) / x.shape[-1] ** 0.5)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without the reference's progress bars."""
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
    yield
