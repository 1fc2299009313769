"""The lab that all tests of the runtime share."""

import pathlib
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.runtime.harness import Lab, make_lab


@pytest.fixture(autouse=True, scope="package")
def _compile_for_real() -> Iterator[None]:
  """Turns JAX's persistent cache off.

  An executable that it loads can't be serialised again (on CPU, jax 0.10.2:
  "Function ... not found" when the copy is loaded), and the runtime does.
  """
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_enable_compilation_cache", before)
  compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
  """A tiny checkpoint and a store of compiled programs."""
  root: pathlib.Path = tmp_path_factory.mktemp("lab")
  return make_lab(root)
