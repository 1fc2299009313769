"""The executables of one instance: warm in memory, stored, or compiled.

A program is named by what it does and how many devices it spans; the store
keeps it in serialised form for any devices (`relocate.py`). Executables
belong to one run: its store folder is its own.
"""

import dataclasses
import enum
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax

from resilient_moe.mesh import relocate
from resilient_moe.mesh.programs import (
  InstanceShape,
  Lower,
  lower_rank_programs,
  lower_step,
)

# A family of one device's programs, by name; each is lowered when needed.
LowerPrograms = Callable[[InstanceShape, jax.Device], dict[str, Lower]]


class Source(enum.StrEnum):
  """Where an executable came from, fastest first."""

  WARM = "warm"  # loaded on these devices and run once
  STORED = "stored"  # deserialised
  COMPILED = "compiled"


def step_name(chunk: int, size: int) -> str:
  """Name of the step program of a chunk width over `size` ranks."""
  return f"step{chunk}x{size}"


@functools.cache
def compiler_options() -> dict[str, str | bool]:
  """XLA options for CPU that halve compilation at the same speed and bits.

  Measured on jax 0.10.2: 3.7 s -> 2.0 s for the decode step. An option that
  a version doesn't know (0.11 has no fusion emitters to switch off) is left
  out.
  """
  if jax.default_backend() != "cpu":
    return {}
  wanted: dict[str, str | bool] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": "1",
  }
  return {k: v for k, v in wanted.items() if _accepts({k: v})}


def _accepts(options: dict[str, str | bool]) -> bool:
  try:
    jax.jit(lambda x: x).lower(1.0).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError:  # "No such compile option"
    return False
  return True


class Executables:
  """Programs of an instance by name and devices."""

  def __init__(
    self, shape: InstanceShape, folder: pathlib.Path | None = None
  ) -> None:
    self.shape = shape
    self._folder = folder
    self._loaded: dict[tuple, jax.stages.Compiled] = {}
    self._portable: dict[str, relocate.Portable] = {}
    if folder is not None:
      folder.mkdir(parents=True, exist_ok=True)

  def step(
    self, chunk: int, devices: Sequence[jax.Device]
  ) -> tuple[jax.stages.Compiled, Source]:
    """The step program over a mesh of these devices."""
    lower = lambda: lower_step(self.shape, devices, chunk)
    return self._get(step_name(chunk, len(devices)), devices, lower)

  def rank_programs(self, device: jax.Device) -> dict[str, jax.stages.Compiled]:
    """The collective-free programs of one device."""
    return self.programs(lower_rank_programs, device)

  def programs(
    self, lower: LowerPrograms, device: jax.Device
  ) -> dict[str, jax.stages.Compiled]:
    """A family of programs of one device."""
    return {
      name: self._get(name, [device], lowered)[0]
      for name, lowered in lower(self.shape, device).items()
    }

  def compile_family(
    self, lower: LowerPrograms, name: str, device: jax.Device
  ) -> None:
    """Puts one program of a family in the store."""
    if self._find(name) is None:
      compiled = self._compile(lower(self.shape, device)[name]())
      self._keep(name, compiled, [device])

  def has_programs(self, lower: LowerPrograms) -> bool:
    """Whether a family can be had without compiling."""
    names = lower(self.shape, jax.devices()[0])
    return all(self._find(name) is not None for name in names)

  def has_rank_programs(self) -> bool:
    """Whether they can be had without compiling."""
    return self.has_programs(lower_rank_programs)

  def available(self, chunk: int, size: int) -> bool:
    """Whether a step over `size` ranks can be had without compiling."""
    return self._find(step_name(chunk, size)) is not None

  def compile_for(self, chunk: int, devices: Sequence[jax.Device]) -> None:
    """Puts a step program in the store without loading it anywhere."""
    name = step_name(chunk, len(devices))
    if self._find(name) is None:
      self._keep(name, self._compile(
        lower_step(self.shape, devices, chunk)), devices)  # fmt: skip

  def _get(
    self,
    name: str,
    devices: Sequence[jax.Device],
    lower: Lower,
  ) -> tuple[jax.stages.Compiled, Source]:
    key = (name, tuple(d.id for d in devices))
    if key in self._loaded:
      return self._loaded[key], Source.WARM
    portable = self._find(name)
    if portable is not None:
      self._loaded[key] = relocate.load(portable, devices)
      return self._loaded[key], Source.STORED
    self._loaded[key] = self._compile(lower())
    self._keep(name, self._loaded[key], devices)
    return self._loaded[key], Source.COMPILED

  def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    with relocate.compiled_here():
      return lowered.compile(compiler_options=compiler_options())

  def _find(self, name: str) -> relocate.Portable | None:
    if name in self._portable:
      return self._portable[name]
    if self._folder is None or not (file := self._folder / name).is_file():
      return None
    self._portable[name] = relocate.Portable.from_bytes(file.read_bytes())
    return self._portable[name]

  def _keep(
    self,
    name: str,
    compiled: jax.stages.Compiled,
    devices: Sequence[jax.Device],
  ) -> None:
    if self._folder is not None:
      self._portable[name] = relocate.serialize(compiled, devices)
      # Renamed into place, so that a reader never sees half a file.
      partial = self._folder / f".{name}.{time.monotonic_ns()}"
      partial.write_bytes(self._portable[name].to_bytes())
      partial.rename(self._folder / name)


def write_shape(shape: InstanceShape, file: pathlib.Path) -> None:
  """Records an instance's shape for the process that compiles ahead."""
  file.write_text(json.dumps(dataclasses.asdict(shape)))


def read_shape(file: pathlib.Path) -> InstanceShape:
  """The inverse of `write_shape`."""
  from resilient_moe.model.config import ModelConfig, StepOptions

  fields = json.loads(file.read_text())
  return InstanceShape(
    ModelConfig(**fields["config"]),
    StepOptions(**fields["options"]),
    fields["slots"],
    fields["copies"],
  )
