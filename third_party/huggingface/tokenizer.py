"""Text <-> tokens of a published checkpoint, by its tokenizer.json.

The `tokenizers` package does the work: pip install resilient-moe[text].
"""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

from third_party.huggingface.tensor_files import read_json

FILE = "tokenizer.json"
_STOPS = ("generation_config.json", "config.json")  # the first that says


class Tokenizer:
  """A checkpoint's tokenizer, and the tokens that end an answer."""

  def __init__(self, folder: str | os.PathLike[str]) -> None:
    """Reads tokenizer.json.

    Raises:
      ValueError: there is none, or it isn't readable.
      ImportError: the `tokenizers` package isn't installed.
    """
    file = pathlib.Path(folder) / FILE
    if not file.is_file():
      raise ValueError(
        f"{folder}: {FILE} is missing; prompts of this model are token ids"
      )
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        f"{file} needs the package tokenizers: pip install "
        "resilient-moe[text]; or give prompts as token ids"
      ) from error
    try:
      self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # of no narrower type
      raise ValueError(f"{file}: not readable ({error})") from error
    self.stop = stop_tokens(folder)

  def encode(self, text: str) -> tuple[int, ...]:
    """A text's tokens, with those that the checkpoint puts around it."""
    return tuple(self._tokenizer.encode(text).ids)

  def decode(self, tokens: Iterable[int]) -> str:
    """Tokens as text, without the special ones."""
    return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

  @property
  def vocab_size(self) -> int:
    """Tokens that there are, added ones included."""
    return int(self._tokenizer.get_vocab_size())


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder has a tokenizer.json."""
  return (pathlib.Path(folder) / FILE).is_file()


def stop_tokens(folder: str | os.PathLike[str]) -> tuple[int, ...]:
  """The tokens that end an answer: `eos_token_id`, one or several."""
  for name in _STOPS:
    file = pathlib.Path(folder) / name
    if not file.is_file():
      continue
    found = read_json(file).get("eos_token_id")
    if found is None:
      continue
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
      raise ValueError(
        f"{file}: eos_token_id={found!r}: needed is a token id, or several"
      )
    return tuple(ids)
  return ()
