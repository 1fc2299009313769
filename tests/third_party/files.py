"""Checkpoint folders written by hand: no torch, any tensor, any field."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from third_party import huggingface as hf
from third_party.huggingface.fields import Fields
from third_party.huggingface.tensor_files import DTYPES, INDEX

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
MIXTRAL = {
  "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
  "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
  "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2,
  "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False,
  "sliding_window": None, "max_position_embeddings": 128, "hidden_act": "silu",
  "torch_dtype": "float32",
}  # fmt: skip
DEEPSEEK = {
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
  "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2,
  "num_attention_heads": 2, "intermediate_size": 24, "kv_lora_rank": 8,
  "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
  "v_head_dim": 4, "moe_intermediate_size": 8, "n_routed_experts": 4,
  "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
  "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
  "first_k_dense_replace": 1, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
  "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1,
}  # fmt: skip
GPT_OSS = {
  "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
  "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
  "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
  "experts_per_token": 2, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
  "sliding_window": 8, "initial_context_length": 16, "dtype": "bfloat16",
  "max_position_embeddings": 128,
  "rope_scaling": {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16, "truncate": False,
  },
}  # fmt: skip
OLMOE = {
  **{k: v for k, v in MIXTRAL.items() if k not in ("num_local_experts",)},
  "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe",
  "num_experts": 8, "norm_topk_prob": False,
}  # fmt: skip
QWEN3 = {
  **OLMOE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
  "moe_intermediate_size": 24,
}  # fmt: skip
DEEPSEEK_V2 = {
  **DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"],
  "model_type": "deepseek_v2", "topk_method": "greedy",
  "norm_topk_prob": False, "num_nextn_predict_layers": None,
}  # fmt: skip


def random_tensors(
  fields: dict[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """Every tensor that a config.json asks for."""
  family = hf.FAMILIES[fields["architectures"][0]]
  model = family.read(Fields("test", fields), "float32")
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in model.tensors().items()
  }


def write_folder(
  folder: pathlib.Path,
  fields: dict[str, Any],
  tensors: dict[str, np.ndarray],
  files: int = 2,
) -> pathlib.Path:
  """A checkpoint of that many files, as they are published."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(fields))
  names, weight_map = list(tensors), {}
  for i in range(files):
    file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
    part = {name: tensors[name] for name in names[i::files]}
    write_tensors(folder / file, part)
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(index))
  return folder


def write_tensors(
  file: pathlib.Path, tensors: dict[str, np.ndarray], **changes: Any
) -> None:
  """A safetensors file; `changes`: what its header says instead, by tensor."""
  spelt = {dtype: name for name, dtype in DTYPES.items()}
  spelt[np.dtype(np.int64)] = "I64"
  header: dict[str, Any] = {}
  end = 0
  for name, x in tensors.items():
    header[name] = {
      "dtype": spelt[x.dtype], "shape": x.shape,
      "data_offsets": [end, end + x.nbytes],
    }  # fmt: skip
    end += x.nbytes
  header |= changes
  text = json.dumps(header).encode()
  data = b"".join(np.ascontiguousarray(x).tobytes() for x in tensors.values())
  file.write_bytes(len(text).to_bytes(8, "little") + text + data)
