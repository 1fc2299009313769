"""Step programs by themselves: compiled, fed with random weights, timed."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from experiments.bench_models import devices
from resilient_moe.mesh.executables import compiler_options
from resilient_moe.mesh.programs import (
  InstanceShape,
  lower_step,
  make_mesh,
  step_shapes,
  step_specs,
)
from resilient_moe.model.step import pack, routing_arrays

Arrays = Any


@dataclasses.dataclass(frozen=True)
class Program:
  """A step program with its arguments on the devices."""

  compiled: jax.stages.Compiled
  arguments: tuple[Arrays, ...]  # params, cache, routing, packed batch
  compile_s: float

  def __call__(self) -> None:
    """One step, waited for."""
    jax.block_until_ready(self.compiled(*self.arguments))

  @property
  def temp_bytes(self) -> int:
    """What the step allocates beside its arguments and results."""
    return int(memory(self.compiled).temp_size_in_bytes)


def memory(compiled: jax.stages.Compiled) -> Any:
  """What the compiler says about a program's memory."""
  found = compiled.memory_analysis()
  assert found is not None  # no backend that we use is silent
  return found


@functools.lru_cache(maxsize=32)
def _compiled(
  shape: InstanceShape, ranks: int, chunk: int
) -> tuple[jax.stages.Compiled, float]:
  start = time.perf_counter()
  lowered = lower_step(shape, devices(ranks), chunk)
  compiled = lowered.compile(compiler_options=compiler_options())
  return compiled, time.perf_counter() - start


def program(
  shape: InstanceShape, ranks: int, chunk: int, context: int
) -> Program:
  """A step over `ranks`: every row decodes at `context`.

  With a chunk, each rank also prefills `chunk` tokens behind `context`.
  """
  compiled, compile_s = _compiled(shape, ranks, chunk)
  mesh = make_mesh(devices(ranks))
  specs, _ = step_specs(shape)
  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  shapes = step_shapes(shape, ranks, chunk)
  # One tree of host arrays at a time: caches are large.
  params = jax.tree.map(
    lambda s, spec: place(_random(s), spec), shapes[0], specs[0]
  )
  cache = place(_random(shapes[1]), specs[1])
  routing = jax.tree.map(place, _routing(shape, ranks), specs[2])
  packed = place(_batch(shape, ranks, chunk, context), specs[3])
  return Program(compiled, (params, cache, routing, packed), compile_s)


def _random(s: jax.ShapeDtypeStruct) -> np.ndarray:
  rng = np.random.default_rng(len(s.shape))
  values = rng.standard_normal(s.shape, np.float32)
  values *= np.float32(0.05)
  return values.astype(s.dtype)


def _routing(shape: InstanceShape, ranks: int) -> dict[str, Any]:
  """Expert e on rank e mod R."""
  n = shape.config.n_experts
  expert = np.arange(n)
  entries = np.full((n, shape.copies, 2), -1, np.int32)
  entries[:, 0, 0], entries[:, 0, 1] = expert % ranks, expert // ranks
  return routing_arrays(
    entries, np.arange(ranks), shape.slots, np.zeros(n, bool)
  )


def _batch(
  shape: InstanceShape, ranks: int, chunk: int, context: int
) -> np.ndarray:
  rng = np.random.default_rng(0)
  rows, vocab = shape.options.rows, shape.config.vocab_size
  decode = np.zeros((ranks, rows, 3), np.int32)
  decode[:, :, 0] = rng.integers(0, vocab, (ranks, rows))
  decode[:, :, 1] = context
  tokens = rng.integers(0, vocab, (ranks, chunk)).astype(np.int32)
  fields = np.zeros((ranks, 4), np.int32)
  fields[:, 0], fields[:, 1] = context, chunk
  if chunk:  # the chunk's own row is the last, and does not decode
    fields[:, 2] = rows - 1
    decode[:, -1, 1] = -1
  cold = np.zeros((ranks, rows), np.float32)
  return pack(decode, cold, tokens, fields, np.zeros(ranks, np.float32))
