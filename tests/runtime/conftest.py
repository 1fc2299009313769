"""The lab that all tests of the runtime share."""

import pytest

from tests.runtime.harness import Lab, make_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
  """A tiny checkpoint and a store of compiled programs."""
  return make_lab(tmp_path_factory.mktemp("lab"))
