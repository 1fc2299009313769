"""The fields that all families have in common."""

from typing import Any

from resilient_moe.model.config import ModelConfig
from third_party.huggingface.fields import Fields


def decoder(fields: Fields) -> dict[str, Any]:
  """The sizes that every decoder has, as fields of ModelConfig."""
  fields.choose("hidden_act", ("silu",), "silu")
  fields.take("max_position_embeddings", None)  # for scaled positions only
  return {
    "vocab_size": fields.size("vocab_size"),
    "n_layers": fields.size("num_hidden_layers"),
    "d_model": fields.size("hidden_size"),
    "n_heads": fields.size("num_attention_heads"),
    "top_k": fields.size("num_experts_per_tok"),
    "norm_eps": fields.number("rms_norm_eps"),
    "tied_embeddings": fields.truth("tie_word_embeddings", False),
  }


def grouped_heads(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
  """Keys, values and their width; the tensors' shapes must agree."""
  return {
    "n_kv_heads": fields.size("num_key_value_heads", sizes["n_heads"]),
    "head_dim": fields.size(
      "head_dim", sizes["d_model"] // sizes["n_heads"]
    ),
  }


def dense_where(layers: list[int], n_layers: int) -> dict[str, Any]:
  """Layers without experts: how many lead, and which others there are."""
  lead = next((i for i in range(n_layers) if i not in layers), n_layers)
  return {
    "dense_layers": lead,
    "dense_at": tuple(i for i in sorted(layers) if i >= lead),
  }


def windows(window: int, n_layers: int) -> tuple[int, ...]:
  """The same window in every layer, or none."""
  return (window,) * n_layers if window else ()


def make_config(fields: Fields, values: dict[str, Any]) -> ModelConfig:
  """The config; what contradicts itself is an error of that file."""
  try:
    return ModelConfig(**values)
  except ValueError as error:
    raise ValueError(f"{fields.where}: as the model's config, {error}") from (
      error
    )
