"""Compiles the kernels on their first use, and makes them known to XLA."""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import shlex
import subprocess

import jax

from resilient_moe.compiled import compiled_once

_SOURCES = pathlib.Path(__file__).parent
_MAIN = _SOURCES / "handlers.cc"
_TARGETS = ("rmoe_grouped_matmul", "rmoe_experts", "rmoe_attend")
_COMPILE_S = 300
_FLAGS = (
  "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared",
  "-fPIC", "-pthread",
)  # fmt: skip

_log = logging.getLogger(__name__)


@functools.cache
def register() -> str:
  """Makes the kernels known to XLA; "" or why they can't be used.

  Compiled with `$CXX`, or `c++`, into `$RMOE_NATIVE_CACHE` or the user's cache
  folder, once a machine and version of jaxlib. Programs that were stored by
  another process need this before they are loaded.
  """
  try:
    library = ctypes.CDLL(str(_built()))
    for name in _TARGETS:
      capsule = jax.ffi.pycapsule(getattr(library, name))
      jax.ffi.register_ffi_target(name, capsule, platform="cpu")
  except (OSError, subprocess.SubprocessError) as error:
    why = getattr(error, "stderr", None) or str(error)
    _log.warning(
      "no native CPU kernels, XLA's own code is used: %s", why.strip()[-500:]
    )
    return why
  return ""


def _built() -> pathlib.Path:
  """The library, compiled if there is none for this source and machine."""
  compiler = shlex.split(os.environ.get("CXX") or "c++")
  command = [*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir()]
  path = _folder() / f"kernels-{_digest(command)}.so"
  compiled_once(path, [*command, str(_MAIN)], _COMPILE_S)
  return path


def _folder() -> pathlib.Path:
  if given := os.environ.get("RMOE_NATIVE_CACHE"):
    return pathlib.Path(given)
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache) / "resilient_moe"


def _digest(command: list[str]) -> str:
  """Of all that the library depends on; several machines share a folder."""
  digest = hashlib.sha256(" ".join(command).encode())
  for source in sorted(_SOURCES.glob("*.h")) + [_MAIN]:
    digest.update(source.read_bytes())
  for fact in (importlib.metadata.version("jaxlib"), platform.machine()):
    digest.update(fact.encode())
  digest.update(_processor().encode())
  return digest.hexdigest()[:16]


def _processor() -> str:
  """What `-march=native` goes by, where the system says it."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  wanted = ("model name", "flags", "Features")
  return "".join(sorted({x for x in lines if x.startswith(wanted)}))
