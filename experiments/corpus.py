"""Text that every Python carries: pydoc's topics and the stdlib's docstrings.

Nothing is downloaded and nothing of the standard library is imported: sources
are parsed with `ast`. A document is a pydoc topic (reference prose) or a
module, written as the Python that its docstrings come from:

  class Queue:
      \"\"\"Create a queue object with a given maximum size.\"\"\"

      def get(self, block=True, timeout=None):
          \"\"\"Remove and return an item from the queue. ...\"\"\"

Which documents are held out is a rule on the name (`workload.held_out`), so
that prompts of the serving workload can be drawn from text never trained on.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator
from pydoc_data import topics as pydoc_topics

import numpy as np

from resilient_moe.serving.workload import held_out

SEPARATOR = 0  # the byte between two documents; no document contains it
_SKIPPED = frozenset(
  {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "__pycache__",
    "_bundled",
    "__phello__",
    "lib-dynload",
  }
)
_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Document:
  """A named text; `held_out` is the rule applied to the name."""

  name: str
  text: str

  @property
  def held_out(self) -> bool:
    return held_out(self.name)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The two byte streams, documents joined and ended by `SEPARATOR`."""

  train: np.ndarray  # [train_bytes] uint8
  held_out: np.ndarray  # [held_out_bytes] uint8
  documents: int
  sha1: str  # of train + held out: other Pythons carry other text


def topic_documents() -> Iterator[Document]:
  """Every topic of `pydoc_data.topics`, sorted by name."""
  for name, text in sorted(pydoc_topics.topics.items()):
    yield Document(name, text.strip() + "\n")


def module_documents(root: pathlib.Path | None = None) -> Iterator[Document]:
  """One document per documented module below `root` (default: the stdlib)."""
  root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
  for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    if _SKIPPED.intersection(parts):
      continue
    text = module_text(_read_source(path))
    if text:
      yield Document(".".join(p for p in parts if p != "__init__"), text)


def module_text(source: str) -> str:
  """The docstrings of a module, in place under their `class` and `def`."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in other people's code
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return ""  # a template or a deliberately broken file
  chunks = [_quoted(ast.get_docstring(tree), indent=0)]
  chunks += _member_chunks(tree, indent=0)
  return "\n".join(chunk for chunk in chunks if chunk)


@functools.cache
def load(text_bytes: int = 0) -> Corpus:
  """The corpus, or the first `text_bytes` of each side of the split.

  Deterministic for one installed Python.
  """
  documents = list(unique([*topic_documents(), *module_documents()]))
  train = _join(d for d in documents if not d.held_out)
  held = _join(d for d in documents if d.held_out)
  if text_bytes:
    train, held = train[:text_bytes], held[:text_bytes]
  digest = hashlib.sha1(train.tobytes() + held.tobytes()).hexdigest()
  return Corpus(train, held, len(documents), digest)


def unique(documents: list[Document]) -> Iterator[Document]:
  """Drops paragraphs seen before, so that no text is on both sides.

  Docstrings are copied between modules (a pure-Python twin of a C module, a
  subclass that repeats its parent); a copy in the held-out part would be
  scored as if it had been predicted. Paragraphs shorter than a line stay: they
  are idiom, not copies.
  """
  seen: set[bytes] = set()
  for document in documents:
    kept = []
    for paragraph in document.text.split("\n\n"):
      key = hashlib.sha1(" ".join(paragraph.split()).encode()).digest()
      if len(paragraph) > 80 and key in seen:
        continue
      seen.add(key)
      kept.append(paragraph)
    if kept:
      yield Document(document.name, "\n\n".join(kept))


def _member_chunks(node: ast.AST, indent: int) -> list[str]:
  """Signature and docstring of each documented member, depth first."""
  chunks = []
  for child in getattr(node, "body", []):
    if not isinstance(child, _Documented):
      continue
    inner = _member_chunks(child, indent + 4)
    doc = _quoted(ast.get_docstring(child), indent + 4)
    if doc or inner:
      chunks.append(_signature(child, indent) + doc)
      chunks += inner
  return chunks


def _signature(node: _Documented, indent: int) -> str:
  """The `class` or `def` line, without decorators."""
  if isinstance(node, ast.ClassDef):
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
  else:
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    head = f"{kind} {node.name}({ast.unparse(node.args)}){result}:"
  return " " * indent + head + "\n"


def _quoted(doc: str | None, indent: int) -> str:
  """A docstring between its quotes, at the given indent."""
  if not doc:
    return ""
  doc = inspect.cleandoc(doc)
  end = "\n" if "\n" in doc else ""
  lines = f'"""{doc}{end}"""'.split("\n")
  return "".join((" " * indent + line).rstrip() + "\n" for line in lines)


def _read_source(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError:
    return ""  # the few Latin-1 sources are encoding tests


def _join(documents: Iterator[Document]) -> np.ndarray:
  """Documents as one byte stream, each ended by the separator."""
  stream = bytearray()
  for document in documents:
    stream += document.text.replace("\0", "").encode("utf-8", "replace")
    stream.append(SEPARATOR)
  return np.frombuffer(bytes(stream), np.uint8)
