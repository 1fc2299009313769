"""Strict settings for every test, and the fixtures they share.

JAX is set up through the environment before anything imports it, so that
tests of the host-only packages run without it and processes that a test starts
inherit the same settings (they can still choose their own device count).
"""

import os
import pathlib
import shlex
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
  import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 9  # eight ranks and a spare
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")

_SETTINGS = {
  "JAX_PLATFORMS": "cpu",
  "JAX_NUM_CPU_DEVICES": str(DEVICES),
  "JAX_NUMPY_RANK_PROMOTION": "raise",
  # Compiled programs outlive the session, and parallel workers share them:
  # whoever finds an entry half written compiles for itself (`setup.cfg`).
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  "RMOE_NATIVE_CACHE": str(ROOT / ".cache" / "native"),
  "MPLBACKEND": "agg",
  "MPLCONFIGDIR": str(ROOT / ".cache" / "matplotlib"),
}
for _name, _value in _SETTINGS.items():
  os.environ.setdefault(_name, _value)


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
  """The root of the repository."""
  return ROOT


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
  """The seed of a test: its own by default, `RMOE_SEED` to repeat or vary."""
  given = os.environ.get("RMOE_SEED")
  return int(given) if given else zlib.crc32(request.node.nodeid.encode())


@pytest.fixture
def rng(seed: int) -> "np.random.Generator":
  """A NumPy generator from the test's seed."""
  import numpy as np

  return np.random.default_rng(seed)


@pytest.fixture
def strict_transfers() -> Iterator[None]:
  """Forbids implicit copies from host to device.

  For tests of compiled programs, which must get every argument from a device:
  `pytestmark = pytest.mark.usefixtures("strict_transfers")`. The runtime
  legitimately sends batches and tables, so it is not on for all.
  """
  import jax

  with jax.transfer_guard_host_to_device("disallow"):
    yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
  """That of `-n`, see `parallel`; other values of `--dist` are xdist's own."""
  if config.getoption("dist") != "load":
    return None
  from tests import parallel

  return parallel.Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """In a worker of xdist, what takes long comes first."""
  if WORKER:
    from tests import parallel

    items.sort(key=lambda item: parallel.order(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
  item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:
  """Prints under a failure the command that repeats it, seed included."""
  report = yield
  if report.failed and "seed" in getattr(item, "fixturenames", ()):
    value = item.funcargs.get("seed")
    report.sections.append(
      (
        "to repeat",
        f"RMOE_SEED={value} .venv/bin/python -m pytest "
        f"{shlex.quote(item.nodeid)}",
      )
    )
  return report
