"""What hardware is to the cost model: numbers, each with where it is from.

A `Figure` is a float that carries its source; one whose source begins with
`assumed` has none, and says why that value was taken. `devices.py` has the
devices by name. Peaks are peaks: `efficiency` says which share of them a
program gets.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

DTYPES = ("fp32", "bf16", "fp8")


class Figure(float):
  """A number and its source."""

  source: str

  def __new__(cls, value: float, source: str) -> "Figure":
    figure = super().__new__(cls, value)
    figure.source = source
    return figure

  def __getnewargs__(self) -> tuple[float, str]:  # type: ignore[override]
    return float(self), self.source

  @property
  def assumed(self) -> bool:
    """Whether nobody vouches for it."""
    return self.source.startswith("assumed")


def assumed(value: float, why: str) -> Figure:
  """A number without a source, and why it is this one."""
  return Figure(value, f"assumed: {why}")


@dataclasses.dataclass(frozen=True)
class Link:
  """A way for bytes, one direction. The first byte takes `latency_s`."""

  latency_s: Figure
  bytes_per_s: Figure


@dataclasses.dataclass(frozen=True)
class Device:
  """An accelerator, its node and what starting an engine on it takes.

  Links: `intra` device to device in a node and `inter` between nodes, a
  device's share each; `host` memory of the own host, a device's share;
  `disk` of a node and object `store` of a node, shared by its devices.
  """

  name: str
  memory_bytes: Figure
  memory_bytes_per_s: Figure
  flops_per_s: Mapping[str, Figure]  # dense, by dtype
  devices_per_node: Figure
  intra: Link
  inter: Link
  host: Link
  disk: Link
  store: Link
  process_start_s: Figure  # spawn, import, attach, until weights can be read
  compile_s: Figure  # every program of a mesh, cold
  load_executable_s: Figure  # the same from a cache
  mesh_s: Figure  # survivors agree and connect, programs apart
  memory_efficiency: Figure  # share of peak bandwidth that kernels get
  compute_efficiency: Figure  # share of peak arithmetic
  layer_s: Figure  # launches and synchronisation of one layer
  warm_s: Figure  # look up programs that have run
  table_s: Figure  # swap a routing table on every device
  fence_s: Figure  # refuse a rank: every survivor told
  role_s: Figure  # an attention rank drops its state
  requeue_s: Figure
  copy_latency_s: Figure  # to begin one copy action

  def __post_init__(self) -> None:
    for name, figure in self.figures():
      if not figure > 0:
        raise ValueError(f"{self.name}: {name}={figure}: above 0")
    for name in ("memory_efficiency", "compute_efficiency"):
      share = getattr(self, name)
      if share > 1:
        raise ValueError(f"{self.name}: {name}={share}: at most 1")

  def flops(self, dtype: str) -> float:
    """Peak arithmetic in `dtype`; bf16's where it has no faster one.

    Raises:
      ValueError: unknown dtype.
    """
    if dtype not in DTYPES:
      raise ValueError(f"dtype={dtype!r}; choices: {', '.join(DTYPES)}")
    if dtype in self.flops_per_s:
      return self.flops_per_s[dtype]
    return self.flops_per_s["bf16" if dtype == "fp8" else "fp32"]

  def figures(self) -> Iterator[tuple[str, Figure]]:
    """Every number by its name, links and dtypes as `link.field`."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, Figure):
        yield field.name, value
      elif isinstance(value, Link):
        yield f"{field.name}.latency_s", value.latency_s
        yield f"{field.name}.bytes_per_s", value.bytes_per_s
      elif isinstance(value, Mapping):
        yield from ((f"flops.{k}", v) for k, v in value.items())


def replace(device: Device, **figures: Figure) -> Device:
  """The device with some numbers replaced: `disk__bytes_per_s=Figure(...)`.

  Raises:
    ValueError: unknown number; names the choices.
  """
  known = {name.replace(".", "__") for name, _ in device.figures()}
  for name, figure in figures.items():
    if name not in known:
      choices = ", ".join(sorted(known))
      raise ValueError(f"unknown number {name!r}; choices: {choices}")
    outer, _, inner = name.partition("__")
    if not inner:
      device = dataclasses.replace(device, **{outer: figure})  # type: ignore
    elif outer == "flops":
      flops = {**device.flops_per_s, inner: figure}
      device = dataclasses.replace(device, flops_per_s=flops)
    else:
      link = dataclasses.replace(getattr(device, outer), **{inner: figure})
      device = dataclasses.replace(device, **{outer: link})
  return device


def measured(base: Device, path: str | pathlib.Path) -> Device:
  """`base` with the numbers that `experiments.measure_machine` wrote.

  Raises:
    ValueError: not such a file; names the key.
  """
  found: dict[str, Any] = json.loads(pathlib.Path(path).read_text())
  if not isinstance(found.get("figures"), dict):
    raise ValueError(f"{path}: no 'figures'; write it by measure_machine")
  figures = {
    name.replace(".", "__"): Figure(value, f"measured: {found['command']}")
    for name, value in found["figures"].items()
  }
  return replace(base, **figures)
