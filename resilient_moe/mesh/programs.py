"""The programs of an instance, described before they are compiled.

Two kinds. *Step* programs hold collectives and belong to one mesh: an ordered
list of devices. *Rank* programs (commit, slot write) belong to one device and
hold none, so that they survive every change of membership: a loss leaves only
the step programs to be had anew.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.dispatch import AXIS
from resilient_moe.model.params import ParamSpec, describe, is_spec
from resilient_moe.model.step import (
  batch_width,
  cache_shape,
  commit_chunk,
  commit_rows,
  rank_step,
)

Tree = dict[str, Any]
Lower = Callable[[], jax.stages.Lowered]  # lowers when it is needed


@dataclasses.dataclass(frozen=True)
class InstanceShape:
  """What every program of an instance is compiled for."""

  config: ModelConfig
  options: StepOptions
  slots: int  # S, physical expert slots of a rank
  copies: int  # C, columns of the routing table

  def chunks(self) -> tuple[int, ...]:
    """The step's widths: decode only, and with a chunk of prompt."""
    return (0, self.options.chunk)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """The expert-parallel mesh over these devices, in this order."""
  return Mesh(np.array(devices), (AXIS,))


def expert_shapes(shape: InstanceShape, n_ranks: int) -> Tree:
  """Expert stacks of `n_ranks` ranks: {name: [L, R, S, ...]}."""
  specs = describe(shape.config)["experts"]

  def of(spec: ParamSpec) -> jax.ShapeDtypeStruct:
    n_layers, _, *rest = spec.shape
    full = (n_layers, n_ranks, shape.slots, *rest)
    return jax.ShapeDtypeStruct(full, spec.dtype)

  return jax.tree.map(of, specs, is_leaf=is_spec)


def with_experts(dense: Tree, experts: Tree) -> Tree:
  """The step's parameter tree: dense parameters and slot stacks."""
  return {**dense, "experts": experts}


def dense_shapes(config: ModelConfig) -> Tree:
  """Everything but the experts, as shapes."""
  tree = describe(config)
  del tree["experts"]
  of = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype)
  return jax.tree.map(of, tree, is_leaf=is_spec)


def step_shapes(shape: InstanceShape, n_ranks: int, chunk: int) -> tuple:
  """Arguments of a step program over `n_ranks`, as shapes."""
  config, options = shape.config, shape.options
  cache = list(cache_shape(config, options))
  cache[1] = n_ranks
  e = config.n_experts
  routing = {
    "table": jax.ShapeDtypeStruct((e, shape.copies), jnp.int32),
    "copies": jax.ShapeDtypeStruct((e,), jnp.int32),
    "masked": jax.ShapeDtypeStruct((e,), jnp.bool_),
  }
  params = with_experts(
    dense_shapes(config), expert_shapes(shape, n_ranks)
  )
  width = batch_width(options, chunk)
  return (
    params,
    jax.ShapeDtypeStruct(tuple(cache), config.dtype),
    routing,
    jax.ShapeDtypeStruct((n_ranks, width), jnp.int32),
  )


def step_specs(shape: InstanceShape) -> tuple[tuple, tuple]:
  """Partition specs of a step's arguments and results."""
  dense = jax.tree.map(lambda _: P(), dense_shapes(shape.config))
  experts = jax.tree.map(lambda _: P(None, AXIS), expert_shapes(shape, 1))
  routing = {"table": P(), "copies": P(), "masked": P()}
  arguments = (with_experts(dense, experts), P(None, AXIS), routing, P(AXIS))
  return arguments, (P(None, AXIS), P(AXIS))


def step_function(shape: InstanceShape, n_ranks: int) -> Callable:
  """The rank function, under a name that tells what it was built for."""
  fn = functools.partial(rank_step, shape.config, shape.options, n_ranks)
  named = lambda *args: fn(*args)
  named.__name__ = f"step_{n_ranks}_ranks"
  return named


def lower_step(
  shape: InstanceShape, devices: Sequence[jax.Device], chunk: int
) -> jax.stages.Lowered:
  """A step program for a mesh of devices (`shard_map`)."""
  mesh = make_mesh(devices)
  n = len(devices)
  specs_in, specs_out = step_specs(shape)
  fn = jax.shard_map(
    step_function(shape, n), mesh=mesh, in_specs=specs_in,
    out_specs=specs_out, check_vma=False,
  )  # fmt: skip
  place = lambda s, spec: jax.ShapeDtypeStruct(
    s.shape, s.dtype, sharding=NamedSharding(mesh, spec)
  )
  shapes = jax.tree.map(place, step_shapes(shape, n, chunk), specs_in)
  return jax.jit(fn).lower(*shapes)


def lower_logical_step(
  shape: InstanceShape, device: jax.Device, n_ranks: int, chunk: int
) -> jax.stages.Lowered:
  """The same rank function as N logical ranks on one device (`vmap`)."""
  place = lambda s: jax.ShapeDtypeStruct(
    s.shape, s.dtype, sharding=SingleDeviceSharding(device)
  )
  shapes = jax.tree.map(place, step_shapes(shape, n_ranks, chunk))
  return jax.jit(logical_step(shape, n_ranks)).lower(*shapes)


def logical_step(shape: InstanceShape, n_ranks: int) -> Callable:
  """`rank_step` vectorised over a stacked rank axis."""
  fn = step_function(shape, n_ranks)
  dense = jax.tree.map(lambda _: None, dense_shapes(shape.config))
  stacks = jax.tree.map(lambda _: 1, expert_shapes(shape, 1))
  axes = (with_experts(dense, stacks), 1, None, 0)

  def one_rank(
    params: Tree, cache: jax.Array, routing: Tree, ints: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    expand = lambda x: x[:, None]
    params = with_experts(params, jax.tree.map(expand, params["experts"]))
    delta, tokens = fn(params, cache[:, None], routing, ints[None])
    return delta[:, 0], tokens[0]

  return jax.vmap(one_rank, in_axes=axes, out_axes=(1, 0), axis_name=AXIS)


def write_slot(experts: Tree, new: Tree, slot: jax.Array) -> Tree:
  """One expert's weights into a slot: [L, 1, S, ...] <- [L, ...], donated."""

  def write(stack: jax.Array, value: jax.Array) -> jax.Array:
    zero = jnp.int32(0)
    index = (zero, zero, slot) + (zero,) * (stack.ndim - 3)
    return jax.lax.dynamic_update_slice(stack, value[:, None, None], index)

  return jax.tree.map(write, experts, new)


def rank_shapes(
  shape: InstanceShape, device: jax.Device
) -> dict[str, jax.ShapeDtypeStruct]:
  """What one rank holds on its device: `cache`, and `experts` stacks."""
  on = SingleDeviceSharding(device)
  of = lambda s, t: jax.ShapeDtypeStruct(tuple(s), t, sharding=on)
  cache = cache_shape(shape.config, shape.options)
  return {
    "cache": of(cache, shape.config.dtype),
    "experts": jax.tree.map(
      lambda s: of(s.shape, s.dtype), expert_shapes(shape, 1)
    ),
  }


def lower_commit(
  shape: InstanceShape, device: jax.Device, chunk: int
) -> jax.stages.Lowered:
  """Scatters the delta of a step of that width into the donated cache."""
  config, options = shape.config, shape.options
  on = SingleDeviceSharding(device)
  of = lambda s, t: jax.ShapeDtypeStruct(tuple(s), t, sharding=on)
  fn = commit_chunk if chunk else commit_rows
  width = options.rows + chunk
  delta = of(
    (config.n_layers, 1, width, config.kv_heads, config.kv_width), config.dtype
  )
  ints = of((1, batch_width(options, chunk)), jnp.int32)
  jitted = jax.jit(lambda *a: fn(options, *a), donate_argnums=0)
  return jitted.lower(rank_shapes(shape, device)["cache"], delta, ints)


def lower_write_slot(
  shape: InstanceShape, device: jax.Device
) -> jax.stages.Lowered:
  """One expert's weights into the donated stacks."""
  on = SingleDeviceSharding(device)
  of = lambda s, t: jax.ShapeDtypeStruct(tuple(s), t, sharding=on)
  experts = rank_shapes(shape, device)["experts"]
  one = jax.tree.map(
    lambda s: of((s.shape[0], *s.shape[3:]), s.dtype), experts
  )
  jitted = jax.jit(write_slot, donate_argnums=0)
  return jitted.lower(experts, one, of((), jnp.int32))


def lower_rank_programs(
  shape: InstanceShape, device: jax.Device
) -> dict[str, Lower]:
  """The collective-free programs of one device, by name."""
  lowered: dict[str, Lower] = {
    f"commit{chunk}": functools.partial(lower_commit, shape, device, chunk)
    for chunk in shape.chunks()
  }
  lowered["write_slot"] = functools.partial(lower_write_slot, shape, device)
  return lowered
