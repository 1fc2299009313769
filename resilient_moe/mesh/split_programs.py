"""The programs of attention ranks and expert ranks (disaggregated).

All of them belong to one device and hold no collective: whoever joins or
leaves, nobody's programs change.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from resilient_moe.mesh.programs import (
  InstanceShape,
  Lower,
  dense_shapes,
  expert_shapes,
  lower_commit,
  lower_write_slot,
  rank_shapes,
)
from resilient_moe.model import split_step
from resilient_moe.model.step import batch_width

SMALLEST = 16  # assignments of the smallest expert program


def buckets(shape: InstanceShape) -> tuple[int, ...]:
  """Assignments that expert programs are compiled for, ascending.

  Each four times the one before: what is padded costs next to nothing, the
  blocks that hold no row are not visited.
  """
  options = shape.options
  most = (options.rows + options.chunk) * shape.config.top_k
  sizes = [SMALLEST]
  while sizes[-1] < most:
    sizes.append(sizes[-1] * 4)
  return tuple(sizes)


def lower_attention_programs(
  shape: InstanceShape, device: jax.Device
) -> dict[str, Lower]:
  """By name: begin, go_on, finish and commit of each chunk width.

  Raises:
    ValueError: a model with dense layers between or behind its MoE layers,
      where the step isn't cut.
  """
  if dense_at := shape.config.dense_at:
    raise ValueError(
      f"dense_at={dense_at}: a disaggregated deployment serves models whose "
      "dense layers are the first ones (dense_layers); choose a collocated one"
    )
  lowered: dict[str, Lower] = {}
  for chunk in shape.chunks():
    arguments = _arguments(shape, device, chunk)
    for name, fn in (
      ("begin", split_step.begin),
      ("go_on", split_step.go_on),
      ("finish", split_step.finish),
    ):
      call = functools.partial(fn, shape.config, shape.options)
      lowered[f"{name}{chunk}"] = functools.partial(
        _lower, f"{name}{chunk}", call, arguments[name]
      )
    lowered[f"commit{chunk}"] = functools.partial(
      lower_commit, shape, device, chunk
    )
  return lowered


def lower_expert_programs(
  shape: InstanceShape, device: jax.Device
) -> dict[str, Lower]:
  """By name: the experts for each number of assignments, and slot writes."""
  on = SingleDeviceSharding(device)
  of = lambda s, t: jax.ShapeDtypeStruct(tuple(s), t, sharding=on)
  experts = jax.tree.map(
    lambda s: of(s.shape, s.dtype), expert_shapes(shape, 1)
  )
  config = shape.config
  call = functools.partial(split_step.run_experts, config, shape.options)
  lowered: dict[str, Lower] = {
    f"experts{m}": functools.partial(
      _lower, f"experts{m}", call,
      (experts, of((), jnp.int32), of((m, config.d_model), config.dtype),
       of((m,), jnp.int32), of((m,), jnp.int32)),
    )
    for m in buckets(shape)
  }  # fmt: skip
  lowered["write_slot"] = functools.partial(lower_write_slot, shape, device)
  return lowered


def _arguments(
  shape: InstanceShape, device: jax.Device, chunk: int
) -> dict[str, tuple]:
  """Shapes of each program's arguments."""
  config, options = shape.config, shape.options
  on = SingleDeviceSharding(device)
  of = lambda s, t: jax.ShapeDtypeStruct(tuple(s), t, sharding=on)
  n, d, k = options.rows + chunk, config.d_model, config.top_k
  params = jax.tree.map(
    lambda s: of(s.shape, s.dtype), dense_shapes(config)
  )
  cache = rank_shapes(shape, device)["cache"]
  masked = of((config.n_experts,), jnp.bool_)
  ints = of((1, batch_width(options, chunk)), jnp.int32)
  x, gates = of((n, d), config.dtype), of((n, k), jnp.float32)
  y = of((n, k, d), config.dtype)
  kv = (n, config.kv_heads, config.kv_width)
  first = of((config.dense_layers + 1, *kv), config.dtype)
  rest = (of((1, *kv), config.dtype),) * (config.moe_layers - 1)
  read = (params, cache, masked, ints)
  return {
    "begin": read,
    "go_on": (*read, of((), jnp.int32), x, gates, y),
    "finish": (params, ints, x, gates, y, (first, *rest)),
  }


def _lower(
  name: str, call: Callable[..., Any], arguments: tuple
) -> jax.stages.Lowered:
  named = lambda *args: call(*args)
  named.__name__ = name
  return jax.jit(named).lower(*arguments)
