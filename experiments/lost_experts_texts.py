"""The texts that experts are lost on, cut into windows of tokens.

Of the shipped byte model: text that it never saw, told apart by a rule on the
document's name (`serving.workload.held_out`). Three domains, of what every
Python carries:

  documentation  pydoc's topics, English prose
  docstrings     signatures and docstrings of modules
  code           sources of modules, as they are
"""

import dataclasses
import functools
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from experiments.corpus import (
  SEPARATOR,
  Document,
  module_documents,
  topic_documents,
  unique,
)

OWN = ("documentation", "docstrings", "code")
BYTES = 256  # vocabulary of a model of bytes


class Tokenizer(Protocol):
  """Text to tokens; a token stands for `sizes` bytes of the text."""

  first: int  # the token that begins a window; -1: the window's own first

  def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] int32 and their sizes in bytes [n]."""


class ByteTokenizer:
  """A byte is a token."""

  first = SEPARATOR

  def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    raw = text.replace("\0", "").encode("utf-8", "replace")
    tokens = np.frombuffer(raw, np.uint8).astype(np.int32)
    return tokens, np.ones(len(tokens), np.int64)


class FileTokenizer:
  """A published checkpoint's `tokenizer.json` (the package `tokenizers`)."""

  def __init__(self, folder: pathlib.Path) -> None:
    """Reads it.

    Raises:
      ValueError: there is none.
      ImportError: `tokenizers` isn't installed.
    """
    from third_party.huggingface import tokenizer

    tokenizer.Tokenizer(folder)  # checks the file, and says what is wrong
    import tokenizers

    self._file = tokenizers.Tokenizer.from_file(str(folder / tokenizer.FILE))
    begin = self._file.encode("").ids
    self.first = begin[0] if begin else -1

  def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A byte belongs to the token that reaches it first.

    So the sizes add up, also where several tokens spell one character.
    """
    found = self._file.encode(text, add_special_tokens=False)
    raw = (len(c.encode("utf-8", "replace")) for c in text)
    place = np.concatenate([[0], np.cumsum(list(raw), dtype=np.int64)])
    ends = place[[end for _, end in found.offsets]]
    reached = np.maximum.accumulate(ends)
    sizes = np.diff(reached, prepend=0)
    return np.array(found.ids, np.int32), sizes


@dataclasses.dataclass(frozen=True)
class Windows:
  """What a domain is scored on."""

  name: str
  tokens: np.ndarray  # [W, T + 1] int32; token 0 is read and never scored
  sizes: np.ndarray  # [W, T] int64 bytes of the tokens 1 to T
  scored: np.ndarray  # [W, T] bool
  document: np.ndarray  # [W] int32 which document each was cut from


def own_documents(domain: str) -> list[Document]:
  """The held-out documents of one of our domains.

  Raises:
    ValueError: another name; lists the choices.
  """
  if domain not in OWN:
    raise ValueError(f"domain {domain!r}: choose one of {', '.join(OWN)}")
  if domain == "documentation":
    found = list(unique(list(topic_documents())))
  elif domain == "docstrings":
    # What repeats a topic is dropped, as in training.
    topics = list(topic_documents())
    told = {document.name for document in topics}
    every = unique([*topics, *_modules()])
    found = [d for d in every if d.name not in told]
  else:
    found = list(_sources())
  return [document for document in found if document.held_out]


@functools.cache
def _modules() -> tuple[Document, ...]:
  return tuple(module_documents())


def _sources() -> Iterator[Document]:
  """Every documented module's source, under the name that training knows."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  for document in _modules():
    place = root.joinpath(*document.name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
      if path.is_file():
        yield Document(document.name, path.read_text("utf-8", "replace"))
        break


def text_documents(file: pathlib.Path) -> list[Document]:
  """A text file, cut at empty lines into documents of some length.

  Raises:
    ValueError: it can't be read or holds nothing.
  """
  try:
    text = file.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"texts: {file} can't be read: {error}") from error
  if not text.strip():
    raise ValueError(f"texts: {file} is empty; needed is text in UTF-8")
  return [Document(file.stem, text)]


def cut(
  name: str,
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  context: int,
  warmup: int,
  most: int,
) -> Windows:
  """At most `most` windows, dealt evenly over the documents.

  Each is `context` tokens of one document behind `tokenizer.first`; those
  behind the first `warmup` are scored. Documents are taken round by round, a
  window from each, so that no long one fills a domain.

  Raises:
    ValueError: no document is longer than `warmup`.
  """
  encoded = [tokenizer.encode(d.text) for d in documents]
  queue = _rounds([len(tokens) for tokens, _ in encoded], context, warmup)
  cuts = [
    _window(*encoded[owner], start, tokenizer.first, context)
    for owner, start in queue[:most]
  ]
  if not cuts:
    raise ValueError(
      f"{name}: no text is longer than {warmup} tokens (`warmup`); needed is "
      "a longer one"
    )
  tokens, sizes, scored = (np.stack(part) for part in zip(*cuts, strict=True))
  scored[:, :warmup] = False
  owners = np.array([owner for owner, _ in queue[:most]], np.int32)
  return Windows(name, tokens, sizes, scored, owners)


def _rounds(
  lengths: Sequence[int], context: int, warmup: int
) -> list[tuple[int, int]]:
  """(document, first token) of every window, a window a document at a time."""
  found = []
  for turn in range(-(-max(lengths, default=0) // context)):
    start = turn * context
    found += [
      (owner, start)
      for owner, length in enumerate(lengths)
      if length - start > warmup + 1
    ]
  return found


def _window(
  tokens: np.ndarray, sizes: np.ndarray, start: int, first: int, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens [T + 1], sizes [T], and which belong to the text [T]."""
  row = np.zeros(context + 1, np.int32)
  size, real = np.zeros(context, np.int64), np.zeros(context, bool)
  if first >= 0:
    row[0] = first
  lead = int(first >= 0)  # else the text's own first token begins it
  part = tokens[start : start + context + 1 - lead]
  row[lead : lead + len(part)] = part
  n = lead + len(part) - 1
  begin = start + 1 - lead
  size[:n], real[:n] = sizes[begin : begin + n], True
  return row, size, real


def domains(
  files: Sequence[str], names: Sequence[str]
) -> dict[str, list[Document]]:
  """Each domain's documents: of text files, or of our own domains.

  Raises:
    ValueError: a file that can't be used; a name that isn't known.
  """
  if not files:
    return {name: own_documents(name) for name in names}
  paths = [pathlib.Path(file) for file in files]
  if len({path.stem for path in paths}) < len(paths):
    raise ValueError(f"texts: {', '.join(files)}: two have the same name")
  return {path.stem: text_documents(path) for path in paths}
