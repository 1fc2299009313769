"""What the tests of the process runtime share."""

import pathlib
from collections.abc import Iterator

import pytest

from tests.runtime.harness import Lab
from tests.runtime.process.harness import Marked, Runs, marking


@pytest.fixture
def marked() -> Iterator[Marked]:
  with marking() as mark:
    yield mark


@pytest.fixture
def runs(lab: Lab, tmp_path: pathlib.Path, marked: Marked) -> Runs:
  return Runs(lab, tmp_path / "run", marked)
