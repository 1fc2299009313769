"""The lab that all tests of the runtime share."""

from collections.abc import Sequence

import jax
import pytest

from resilient_moe.mesh import relocate
from tests.runtime.harness import Lab, make_lab

_LOADED: dict[tuple[bytes, tuple[int, ...]], jax.stages.Compiled] = {}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
  """A tiny checkpoint and a store of compiled programs."""
  return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def _load_once(monkeypatch: pytest.MonkeyPatch) -> None:
  """Loads each stored program once a session: half of a run's time.

  Whoever asks for it is still told that it was stored, not warm.
  """
  real = relocate.load

  def load(
    portable: relocate.Portable, devices: Sequence[jax.Device]
  ) -> jax.stages.Compiled:
    key = portable.payload, tuple(d.id for d in devices)
    if key not in _LOADED:
      _LOADED[key] = real(portable, devices)
    return _LOADED[key]

  monkeypatch.setattr(relocate, "load", load)
