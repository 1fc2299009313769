"""Published checkpoints of mixture-of-experts models."""

from third_party.huggingface.checkpoint import (
  FAMILIES,
  Checkpoint,
  is_checkpoint,
  load_huggingface,
  read_config,
)

__all__ = [
  "FAMILIES",
  "Checkpoint",
  "is_checkpoint",
  "load_huggingface",
  "read_config",
]
