"""Executables that can be loaded onto other devices than they were made for.

A step program for 7 of 8 devices is the same code whichever device is
missing; JAX compiles it anew for each set because the device assignment is
part of the cache key. Here a compiled program is serialised once and loaded
for any devices of the same kind and number: one compilation per mesh *size*
serves every survivor set (measured: 3 ms to load against seconds to compile).

PRIVATE: the only module that touches JAX's private serialisation classes;
`tests/mesh/test_relocate.py` says so when a JAX version moves them.
Serialised executables are code: load only what this project stored.
"""

import contextlib
import dataclasses
import io
import pickle
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import compiler
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from resilient_moe.model import native

_Unpickler = serialize_executable._JaxPjrtUnpickler


@dataclasses.dataclass(frozen=True)
class Portable:
  """A serialised program and the ids of the devices it was compiled for."""

  payload: bytes
  in_tree: Any
  out_tree: Any
  device_ids: tuple[int, ...]

  def to_bytes(self) -> bytes:
    return pickle.dumps(
      (self.payload, self.in_tree, self.out_tree, self.device_ids)
    )

  @classmethod
  def from_bytes(cls, data: bytes) -> "Portable":
    return cls(*pickle.loads(data))


_SWITCH = "jax_enable_compilation_cache"
_lock = threading.Lock()
_compiling = 0  # compilations under way, on any thread
_setting = True  # what the cache's switch was before them


@contextlib.contextmanager
def compiled_here() -> Iterator[None]:
  """Programs compiled inside don't come from JAX's persistent cache.

  An executable that was itself loaded from that cache can't be serialised
  again: its kernels are missing when it is loaded (jax 0.10.2). It would also
  serve one run with what another has compiled.
  """
  global _compiling, _setting
  with _lock:
    if not _compiling:
      _setting = bool(getattr(jax.config, _SWITCH))
      _switch_cache(False)
    _compiling += 1
  try:
    yield
  finally:
    with _lock:
      _compiling -= 1
      if not _compiling:
        _switch_cache(_setting)


def _switch_cache(on: bool) -> None:
  if getattr(jax.config, _SWITCH) != on:
    jax.config.update(_SWITCH, on)
    compilation_cache.reset_cache()  # the switch is looked up once


def serialize(
  compiled: jax.stages.Compiled, devices: Sequence[jax.Device]
) -> Portable:
  """Packs a program compiled for `devices`, in mesh order."""
  payload, in_tree, out_tree = serialize_executable.serialize(compiled)
  return Portable(payload, in_tree, out_tree, tuple(d.id for d in devices))


def load(
  portable: Portable, devices: Sequence[jax.Device]
) -> jax.stages.Compiled:
  """The program, ready to run on `devices` in this order.

  Raises:
    ValueError: another number of devices than it was compiled for.
  """
  if len(devices) != len(portable.device_ids):
    raise ValueError(
      f"an executable for {len(portable.device_ids)} devices can't be loaded "
      f"onto {len(devices)}"
    )
  if devices[0].platform == "cpu":
    native.register()  # the program may call the kernels
  reader = _Relocating(portable, list(devices))
  unloaded, args_flat, no_kwargs = reader.load()
  args_info = portable.in_tree.unflatten(args_flat)
  return jax.stages.Compiled(
    unloaded.load(), [], args_info, portable.out_tree, no_kwargs=no_kwargs
  )


class _Relocating(_Unpickler):
  """Reads device ids as places in the mesh, and assigns the new devices."""

  def __init__(self, portable: Portable, devices: list[jax.Device]):
    super().__init__(
      io.BytesIO(portable.payload), devices[0].client, devices
    )
    self.devices_by_id = dict(zip(portable.device_ids, devices, strict=True))
    self._devices = devices

  def persistent_load(self, pid: tuple) -> Any:
    if pid[0] != "exec":
      return super().persistent_load(pid)
    ids = np.array([[d.id for d in self._devices]])
    options = compiler.get_compile_options(
      num_replicas=1, num_partitions=len(self._devices),
      device_assignment=ids, backend=self.backend,
    )  # fmt: skip
    return self.backend.deserialize_executable(
      pid[1], executable_devices=self.execution_devices,
      compile_options=options,
    )  # fmt: skip
