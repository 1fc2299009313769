"""Reads the fields of a config.json so that none is overlooked.

Every field is either read, or known not to change what a decoder computes
(`IRRELEVANT`, and what a family adds to it), or an error: a field that nobody
knows could change the numbers. One that must be there has no default; where
one is given, it is what the reference takes when the field is absent.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

_REQUIRED = object()

IRRELEVANT = frozenset({
  # Who made the file, and how to run it.
  "_name_or_path", "architectures", "auto_map", "dtype", "ep_size",
  "model_type", "return_dict", "torch_dtype", "transformers_version",
  "use_cache", "_attn_implementation", "_experts_implementation",
  # What is said beside the logits.
  "output_attentions", "output_hidden_states", "output_router_logits",
  # Training.
  "attention_dropout", "aux_loss_alpha", "initializer_range",
  "pretraining_tp", "router_aux_loss_coef", "router_jitter_noise", "seq_aux",
  # Tokens with a meaning (`tokenizer.py` reads those that end an answer).
  "bos_token_id", "eos_token_id", "pad_token_id",
  # Shapes of what other implementations hold, or do at once.
  "chunk_size_feed_forward", "is_encoder_decoder",
  # Labels of classifiers, which every config of old carries.
  "id2label", "label2id", "problem_type",
})  # fmt: skip


class Fields:
  """The fields of one config.json, taken one by one."""

  def __init__(self, where: str, values: Mapping[str, Any]) -> None:
    """`where` begins every error."""
    self.where = where
    self._values = dict(values)
    self._taken: set[str] = set()

  def error(self, name: str, value: Any, needed: str) -> ValueError:
    """The error of a field, naming its value and what is needed."""
    return ValueError(f"{self.where}: {name}={value!r}: {needed}")

  def take(self, name: str, default: Any = _REQUIRED, also: str = "") -> Any:
    """A field's value; null counts as absent.

    `also`: another name for the same field. Both may be there, if they agree.
    """
    names = [name, also] if also else [name]
    self._taken |= set(names)
    found = [self._values[n] for n in names if self._values.get(n) is not None]
    if not found:
      if default is _REQUIRED:
        raise ValueError(f"{self.where}: {' or '.join(names)} is missing")
      return default
    if found[0] != found[-1]:
      raise self.error(also, found[-1], f"but {name}={found[0]!r}")
    return found[0]

  def size(self, name: str, default: Any = _REQUIRED, also: str = "") -> int:
    """A field that counts something, at least 1; the default as it is."""
    if default is not _REQUIRED and self.take(name, None, also) is None:
      return int(default)
    value = self.take(name, also=also)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise self.error(name, value, "needed is an integer from 1")
    return value

  def count(self, name: str, default: Any = _REQUIRED) -> int:
    """A field that counts something and may be 0."""
    value = self.take(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
      raise self.error(name, value, "needed is an integer from 0")
    return value

  def number(self, name: str, default: Any = _REQUIRED) -> float:
    """A field that is a number above 0."""
    value = self.take(name, default)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not (real and value > 0):
      raise self.error(name, value, "needed is a number above 0")
    return float(value)

  def truth(self, name: str, default: Any = _REQUIRED) -> bool:
    """A field that is true or false."""
    value = self.take(name, default)
    if not isinstance(value, bool):
      raise self.error(name, value, "choose true or false")
    return value

  def choose(
    self, name: str, choices: Collection[Any], default: Any = _REQUIRED
  ) -> Any:
    """A field of which only some values are supported."""
    value = self.take(name, default)
    if value not in choices:
      spelt = ", ".join(json.dumps(choice) for choice in choices)
      raise self.error(name, value, f"supported: {spelt}")
    return value

  def finish(self, irrelevant: Collection[str] = ()) -> None:
    """Raises for a field that was not read and is not known to be harmless.

    A null or a false says that something is absent.
    """
    known = self._taken | IRRELEVANT | set(irrelevant)
    for name, value in self._values.items():
      if name not in known and value is not None and value is not False:
        raise self.error(
          name, value, "this loader doesn't know the field, which could change "
          "the numbers; remove it from config.json if it doesn't",
        )  # fmt: skip
