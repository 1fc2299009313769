"""Published checkpoints of mixture-of-experts models."""

from third_party.huggingface.checkpoint import (
  FAMILIES,
  Checkpoint,
  is_checkpoint,
  load_huggingface,
  read_config,
)
from third_party.huggingface.save import save_huggingface
from third_party.huggingface.tokenizer import (
  Tokenizer,
  has_tokenizer,
  stop_tokens,
)

__all__ = [
  "FAMILIES",
  "Checkpoint",
  "Tokenizer",
  "has_tokenizer",
  "is_checkpoint",
  "load_huggingface",
  "read_config",
  "save_huggingface",
  "stop_tokens",
]
