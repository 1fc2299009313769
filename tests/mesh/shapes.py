"""A tiny instance whose programs the tests of `mesh` lower and run."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from resilient_moe.mesh import InstanceShape, make_mesh, programs
from resilient_moe.model import ModelConfig, StepOptions
from resilient_moe.model.dispatch import AXIS

CONFIG = ModelConfig(
  vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8,
  n_experts=6, expert_width=16,
)  # fmt: skip
OPTIONS = StepOptions(rows=2, max_len=24, chunk=8, kv_block=8)


def instance(slots: int = 2, **options) -> InstanceShape:
  changed = dataclasses.replace(OPTIONS, **options)
  return InstanceShape(CONFIG, changed, slots=slots, copies=2)


def instance_of(slots: int, **changes) -> InstanceShape:
  """An instance of another model."""
  config = dataclasses.replace(CONFIG, **changes)
  return InstanceShape(config, OPTIONS, slots=slots, copies=2)


def step(shape: InstanceShape, mesh: Mesh | AbstractMesh, chunk: int):
  """The jitted step over a mesh with or without devices, and its shapes."""
  n = mesh.size
  specs_in, specs_out = programs.step_specs(shape)
  fn = jax.shard_map(
    programs.step_function(shape, n), mesh=mesh, in_specs=specs_in,
    out_specs=specs_out, check_vma=False,
  )  # fmt: skip
  place = lambda s, spec: jax.ShapeDtypeStruct(
    s.shape, s.dtype, sharding=NamedSharding(mesh, spec)
  )
  shapes = programs.step_shapes(shape, n, chunk)
  return jax.jit(fn), jax.tree.map(place, shapes, specs_in)


def abstract_mesh(n_ranks: int) -> AbstractMesh:
  kinds = (jax.sharding.AxisType.Auto,)
  return AbstractMesh((n_ranks,), (AXIS,), axis_types=kinds)


@functools.cache
def values(shape: InstanceShape, n_ranks: int, chunk: int) -> tuple:
  """Arguments of a step in NumPy: experts dealt out, every row busy."""
  rng = np.random.default_rng(0)
  params, cache, routing, ints = jax.tree.map(
    lambda s: rng.standard_normal(s.shape).astype(np.float32) / 6,
    programs.step_shapes(shape, n_ranks, chunk),
  )
  e = shape.config.n_experts
  table = np.full((e, shape.copies), -1, np.int32)
  table[:, 0] = np.arange(e)
  routing = {
    "table": table,
    "copies": np.ones(e, np.int32),
    "masked": np.zeros(e, bool),
  }
  ints = np.zeros(ints.shape, np.int32)
  b = shape.options.rows
  ints[:, :b] = rng.integers(0, 64, (n_ranks, b))
  ints[:, b : 2 * b] = rng.integers(0, 20, (n_ranks, b))
  if chunk:
    ints[:, 4 * b : 4 * b + 2] = 3, chunk
    ints[:, 4 * b + 5 :] = rng.integers(0, 64, (n_ranks, chunk))
  return params, cache, routing, ints


def put(shape: InstanceShape, devices, arguments: tuple) -> tuple:
  """The arguments on a mesh of these devices."""
  specs, _ = programs.step_specs(shape)
  mesh = make_mesh(devices)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  return jax.device_put(arguments, shardings)


def devices(*ids: int) -> list[jax.Device]:
  everyone = jax.devices()
  return [everyone[i] for i in ids]


def run(program, shape: InstanceShape, on, chunk: int) -> list[np.ndarray]:
  """Delta and tokens of one step."""
  out = program(*put(shape, on, values(shape, len(on), chunk)))
  return [np.asarray(x) for x in out]
