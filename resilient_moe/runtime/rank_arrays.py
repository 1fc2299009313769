"""What one rank's arrays are, and how one row or slot of them is touched."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resilient_moe.mesh.programs import InstanceShape, expert_shapes
from resilient_moe.model.step import batch_width, cache_shape

Tree = dict[str, Any]
Program = Any  # jax.stages.Compiled; donates its first argument


def put_dense(dense: Tree, device: jax.Device) -> Tree:
  """All parameters but the experts, on the device.

  On CPU these are the host's own arrays where they are aligned
  (`weights.WeightTiers`): nothing is copied, and nobody writes to them.
  """
  return jax.device_put(dense, device)


def put_experts(
  shape: InstanceShape, slots: Iterable[Tree | None], device: jax.Device,
  program: Program,
) -> Tree:  # fmt: skip
  """Stacks [L, 1, S, ...] of an expert's tree for each slot; None: zeros.

  Slot by slot, by the program that writes one: `slots` may read each expert
  when it is asked for, and no more than one is held besides the stacks.
  """
  experts = jax.tree.map(
    lambda s: jax.device_put(np.zeros(s.shape, s.dtype), device),
    expert_shapes(shape, 1),
  )
  for slot, tree in enumerate(slots):
    if tree is not None:
      experts = write_slot(experts, program, slot, tree, device)
      jax.block_until_ready(experts)  # before the next is read
  return experts


def put_cache(shape: InstanceShape, device: jax.Device) -> jax.Array:
  """An empty KV cache, [L, 1, B, 2K, T, d]."""
  zeros = np.zeros(
    cache_shape(shape.config, shape.options), shape.config.dtype
  )
  return jax.device_put(jnp.asarray(zeros), device)


def write_slot(
  experts: Tree, program: Program, slot: int, weights: Tree,
  device: jax.Device,
) -> Tree:  # fmt: skip
  """One expert's weights ([L, ...] leaves, host or device) into a slot."""
  new, index = jax.device_put((weights, np.int32(slot)), device)
  return program(experts, new, index)


def read_slot(experts: Tree, slot: int) -> Tree:
  """An expert's weights as they lie in a slot, [L, ...] leaves."""
  return jax.tree.map(lambda x: np.asarray(x)[:, 0, slot], experts)


def read_row(cache: jax.Array, row: int, tokens: int) -> np.ndarray:
  """KV of a request, [L, 2K, tokens, d], copied to the host."""
  return np.asarray(cache)[:, 0, row, :, :tokens].copy()


def write_row(
  shape: InstanceShape, cache: jax.Array, program: Program, row: int,
  kv: np.ndarray, device: jax.Device,
) -> jax.Array:  # fmt: skip
  """KV [L, 2K, tokens, d] into a row, by the widest commit program."""
  options = shape.options
  width, b = options.chunk, options.rows
  n_layers, heads, tokens, d = kv.shape
  for start in range(0, tokens, width):
    part = kv[:, :, start : start + width]
    delta = np.zeros((n_layers, 1, b + width, heads, d), kv.dtype)
    delta[:, 0, b : b + part.shape[2]] = np.swapaxes(part, 1, 2)
    ints = idle_batch(shape, 1, width)
    ints[0, 4 * b : 4 * b + 3] = start, part.shape[2], row
    cache = program(cache, *jax.device_put((delta, ints), device))
  return cache


def idle_batch(shape: InstanceShape, ranks: int, width: int) -> np.ndarray:
  """A step's integers [ranks, .] in which no row does anything."""
  options = shape.options
  ints = np.zeros((ranks, batch_width(options, width)), np.int32)
  ints[:, options.rows : 2 * options.rows] = -1
  return ints


def idle_delta(shape: InstanceShape, width: int) -> np.ndarray:
  """A step's delta for a commit that writes nothing."""
  n_layers, _, rows, heads, _, d = cache_shape(shape.config, shape.options)
  return np.zeros((n_layers, 1, rows + width, heads, d), shape.config.dtype)
