"""Whether a step grows with cache that is not used."""

import pathlib

import jax
import numpy as np

from experiments import bench_models as models
from experiments.bench_program import Program, memory, program
from experiments.bench_record import Cell, Result, Target, stat
from resilient_moe.mesh.executables import compiler_options
from resilient_moe.mesh.programs import InstanceShape, lower_rank_programs
from resilient_moe.model.step import batch_width, cache_shape

LIMIT = 1.15  # of a ratio that is 1 but for noise


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Decode and commit with short and long caches, the same context in use."""
  name, model = next(iter(settings.models.items()))
  config = models.config_of(name, model, workdir)
  lengths = settings.cache_lens
  context = min(lengths) // 2
  steps, commits = {}, {}
  for length in lengths:
    options = {**model.options, "max_len": length}
    shape = models.shape_of(config, options, settings.ranks)
    steps[str(length)] = program(shape, settings.ranks, 0, context)
    commits[str(length)] = Commit(shape, context)
  found = models.interleaved(steps, settings.calls)
  wrote = models.interleaved(commits, settings.calls)
  rows = [
    _row(length, steps, commits, found, wrote)
    for length in lengths
  ]
  samples = {f"step/{n}": s for n, s in found.items()}
  samples |= {f"commit/{n}": s for n, s in wrote.items()}
  short, long = str(min(lengths)), str(max(lengths))
  ratio = lambda x: stat(x[long]).median / stat(x[short]).median
  grown = steps[long].temp_bytes / max(steps[short].temp_bytes, 1)
  beside = f"max_len {long} against {short}"
  targets = (
    Target(f"step time, {beside}", ratio(found), LIMIT, "times"),
    Target(f"step's temporary bytes, {beside}", grown, 1.01, "times"),
    Target(f"commit time, {beside}", ratio(wrote), 1.5, "times"),
    Target("commit writes in place: bytes not aliased", float(
      max(c.unaliased_bytes for c in commits.values())), 0.0, "bytes"),
  )  # fmt: skip
  note = f"{name}, {settings.ranks} ranks, {context} positions in use"
  return Result("cache", rows, samples, targets, (note,))


class Commit:
  """The commit of a decode step on one rank, its cache donated."""

  def __init__(self, shape: InstanceShape, context: int) -> None:
    device = models.devices(1)[0]
    lowered = lower_rank_programs(shape, device)["commit0"]()
    self._compiled = lowered.compile(compiler_options=compiler_options())
    options, config = shape.options, shape.config
    full = cache_shape(config, options)
    self.cache_bytes = int(np.prod(full)) * np.dtype(config.dtype).itemsize
    put = lambda x: jax.device_put(x, device)
    self._cache = put(np.zeros(full, config.dtype))
    delta = (full[0], 1, options.rows, full[3], full[5])
    self._delta = put(np.ones(delta, config.dtype))
    ints = np.zeros((1, batch_width(options, 0)), np.int32)
    ints[0, options.rows : 2 * options.rows] = context
    self._ints = put(ints)

  def __call__(self) -> None:
    """One commit, waited for."""
    self._cache = self._compiled(self._cache, self._delta, self._ints)
    jax.block_until_ready(self._cache)

  @property
  def temp_bytes(self) -> int:
    return int(memory(self._compiled).temp_size_in_bytes)

  @property
  def unaliased_bytes(self) -> int:
    """Bytes of the result that are not the donated cache's own."""
    found = memory(self._compiled)
    out = int(found.output_size_in_bytes) - int(found.alias_size_in_bytes)
    return max(out, 0)


def _row(
  length: int,
  steps: dict[str, Program],
  commits: dict[str, Commit],
  found: dict[str, list[float]],
  wrote: dict[str, list[float]],
) -> dict[str, Cell]:
  key = str(length)
  return {
    "max_len": length,
    "cache MB a rank": commits[key].cache_bytes / 1e6,
    "step ms": 1e3 * stat(found[key]).median,
    "step temp bytes": steps[key].temp_bytes,
    "commit us": 1e6 * stat(wrote[key]).median,
    "commit temp bytes": commits[key].temp_bytes,
    "commit copied bytes": commits[key].unaliased_bytes,
  }
