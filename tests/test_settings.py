"""What the test session promises (conftest), and what the packaging states."""

import configparser
import re

import numpy as np
import pytest

import resilient_moe
from tests import parallel


def test_there_are_eight_ranks_and_a_spare():
  import jax

  assert len(jax.devices("cpu")) >= 9


def test_compiled_programs_outlive_the_session(repository):
  import jax

  assert jax.config.jax_compilation_cache_dir
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1


def test_rank_promotion_raises():
  import jax.numpy as jnp

  with pytest.raises(ValueError, match="rank_promotion"):
    _ = jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.usefixtures("strict_transfers")
def test_strict_transfers_refuse_host_arrays():
  import jax

  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
    jax.jit(lambda x: x)(np.ones(3))


def test_a_seed_can_be_given(monkeypatch, request):
  monkeypatch.setenv("RMOE_SEED", "7")
  assert request.getfixturevalue("seed") == 7
  assert request.getfixturevalue("rng").integers(1 << 30) == (
    np.random.default_rng(7).integers(1 << 30)
  )


@pytest.mark.parametrize("pins", ["py311", "py312"])
def test_every_dependency_is_pinned(repository, pins):
  text = (repository / "constraints" / f"{pins}.txt").read_text()
  pinned = {_normal(name) for name in re.findall(r"^(.+)==", text, re.M)}
  setup = configparser.ConfigParser()
  setup.read(repository / "setup.cfg")
  lines = setup["options"]["install_requires"].splitlines()
  for extra in ("test", "text", "reference"):
    lines += setup["options.extras_require"][extra].splitlines()
  names = {re.split(r"[<>=\[]", line)[0] for line in lines if line}
  assert {_normal(n) for n in names if not n.startswith("#")} <= pinned


def test_the_version_is_the_same_everywhere(repository):
  version = resilient_moe.__version__
  citation = (repository / "CITATION.cff").read_text()
  assert f"\nversion: {version}\n" in citation
  assert f"\n## {version} " in (repository / "CHANGELOG.md").read_text()


def _normal(name: str) -> str:
  return name.lower().replace("_", "-")


def test_workers_take_whole_files_and_one_of_them_all_processes(repository):
  assert all((repository / part).is_dir() for part in parallel.FIRST)
  here = "tests/test_settings.py"
  assert parallel.unit(f"{here}::test_one[a::b]") == here
  probes, kills = (
    f"tests/runtime/process/test_{name}.py::test_it"
    for name in ("probe", "kills")
  )
  assert parallel.unit(probes) == parallel.unit(kills)
  assert parallel.order(probes) < parallel.order(f"{here}::test_one")
