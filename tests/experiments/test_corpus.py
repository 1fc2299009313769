"""The text: deterministic, split by name, Python that reads as Python."""

import ast
import pathlib
import textwrap

import numpy as np
import pytest

from experiments import corpus


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
  return corpus.load()


def test_the_order_of_the_file_system_does_not_matter(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  for name in ("b", "a", "c/__init__", "c/d"):
    file = tmp_path / f"{name}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'"""Module {name}."""')
  documents = list(corpus.module_documents(tmp_path))
  assert [d.name for d in documents] == ["a", "b", "c", "c.d"]
  found = sorted(tmp_path.rglob("*.py"), reverse=True)
  monkeypatch.setattr(pathlib.Path, "rglob", lambda *_: iter(found))
  assert list(corpus.module_documents(tmp_path)) == documents


def test_a_shorter_corpus_is_the_beginning_of_both_sides(
  text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(corpus, "module_documents", lambda: iter(()))
  short = corpus.load(1000)
  np.testing.assert_array_equal(short.train, text.train[:1000])
  np.testing.assert_array_equal(short.held_out, text.held_out[:1000])
  assert short.sha1 != text.sha1


def test_the_split_is_about_nine_to_one(text: corpus.Corpus) -> None:
  assert len(text.train) > 1_000_000
  assert 0.03 < len(text.held_out) / len(text.train) < 0.2


def test_the_split_follows_the_rule_and_covers_every_document() -> None:
  documents = list(corpus.topic_documents())
  held = {d.name for d in documents if d.held_out}
  assert held == {d.name for d in documents if corpus.held_out(d.name)}
  assert 0 < len(held) < len(documents)


def test_no_paragraph_is_on_both_sides(text: corpus.Corpus) -> None:
  train, held = (
    {
      " ".join(p.split())
      for p in stream.tobytes().decode().split("\n\n")
      if len(p) > 80
    }
    for stream in (text.train, text.held_out)
  )
  assert held
  assert not train & held


def test_the_separator_ends_documents_and_is_nowhere_else(
  text: corpus.Corpus,
) -> None:
  ends = int((text.train == 0).sum() + (text.held_out == 0).sum())
  assert ends == text.documents
  assert text.train[-1] == 0


def test_docstrings_stand_under_their_signature() -> None:
  source = textwrap.dedent('''
    """A module."""
    import os
    class Box(list, metaclass=M):
      "Holds things."
      def put(self, thing: int = 3, *rest, key=None) -> bool:
        """Put a thing.

        Twice.
        """
        return os.path
      def silent(self):
        return 1
    async def f(): "Awaited."
  ''')
  text = corpus.module_text(source)
  assert text == textwrap.dedent('''\
    """A module."""

    class Box(list):
        """Holds things."""

        def put(self, thing: int=3, *rest, key=None) -> bool:
            """Put a thing.

            Twice.
            """

    async def f():
        """Awaited."""
    ''')
  ast.parse(text)


def test_what_is_not_python_gives_no_text() -> None:
  assert corpus.module_text("def f(:\n") == ""
  assert corpus.module_text("x = 1\n") == ""


def test_tests_and_installed_packages_are_left_out(
  tmp_path: pathlib.Path,
) -> None:
  for folder in ("json", "test", "idlelib", "json/tests", "site-packages/x"):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "m.py").write_text('"""A module."""')
  names = [d.name for d in corpus.module_documents(tmp_path)]
  assert names == ["json.m"]


def test_copies_are_dropped_and_idiom_is_kept() -> None:
  long = (
    "A sentence that is long enough to be recognised as a copy of one. " * 2
  )
  a, b = corpus.Document("a", f"{long}\n\nShort."), corpus.Document("b", long)
  c = corpus.Document("c", f"Short.\n\n{long.replace(' ', '  ')}\n\nNew.")
  kept = {d.name: d.text for d in corpus.unique([a, b, c])}
  assert kept == {"a": a.text, "c": "Short.\n\nNew."}
