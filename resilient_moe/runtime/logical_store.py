"""N logical ranks on one device: one array holds all of them.

For a single GPU or TPU, or Colab: the same rank function, vectorised with an
axis name. A lost rank's slice becomes NaN, so that whatever would still use
it shows; the next mesh is stacked anew from the survivors' slices.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resilient_moe.mesh.executables import Executables, Source
from resilient_moe.mesh.programs import (
  InstanceShape,
  expert_shapes,
  lower_logical_step,
  with_experts,
  write_slot,
)
from resilient_moe.model.config import StepOptions
from resilient_moe.model.step import (
  batch_width,
  cache_shape,
  commit_chunk,
  commit_rows,
)
from resilient_moe.runtime.device_store import LostRankError

Tree = dict[str, Any]
Mesh = tuple[int, ...]


class LogicalExecutables(Executables):
  """Step programs over logical ranks; compiled in this process."""

  def step(
    self, chunk: int, devices: Sequence[jax.Device]
  ) -> tuple[jax.stages.Compiled, Source]:
    n, device = len(devices), devices[0]
    lower = lambda: lower_logical_step(self.shape, device, n, chunk)
    return self._get(f"logical_step{chunk}x{n}", [device], lower)

  def available(self, chunk: int, size: int) -> bool:
    return True  # compiled when it is first run, between two steps


class LogicalStore:
  """As `DeviceStore`, with all ranks on one device."""

  def __init__(
    self, shape: InstanceShape, devices: Sequence[jax.Device],
    executables: Executables,
  ) -> None:  # fmt: skip
    self.shape = shape
    self.devices = list(devices)  # the same device for each rank
    self.executables = executables
    self._dense: Tree = {}
    self._mesh: Mesh = ()
    self._stack: Tree = {}  # cache and experts of the mesh, axis 1 its ranks
    self._aside: dict[int, Tree] = {}  # of ranks outside the mesh
    self._lost: set[int] = set()
    options = shape.options
    self._commit = {
      chunk: jax.jit(
        functools.partial(_commit_all, options, chunk), donate_argnums=0
      )
      for chunk in shape.chunks()
    }
    self._write = jax.jit(_write_slot_of, donate_argnums=0)
    self._write_row = jax.jit(_write_row_of, donate_argnums=0)

  # -- contents of a rank

  def add(
    self, rank: int, dense: Tree, slots: Iterable[Tree | None]
  ) -> None:
    put = lambda x: jax.device_put(jnp.asarray(x), self.devices[0])
    if not self._dense:
      self._dense = jax.tree.map(put, dense)
    empty = jax.tree.map(
      lambda s: np.zeros((s.shape[0], *s.shape[3:]), s.dtype),
      expert_shapes(self.shape, 1),
    )
    filled = [empty if tree is None else tree for tree in slots]
    cache = cache_shape(self.shape.config, self.shape.options)
    self._aside[rank] = {
      "experts": jax.tree.map(
        lambda *x: put(np.stack(x, axis=1)[:, None]), *filled
      ),
      "cache": put(np.zeros(cache, self.shape.config.dtype)),
    }
    self._lost.discard(rank)

  def lose(self, rank: int) -> None:
    """The rank's slice becomes NaN; any later use of it is an error."""
    self._check(rank)
    if rank in self._mesh:
      i = self._mesh.index(rank)
      self._stack = jax.tree.map(
        lambda x: x.at[:, i].set(jnp.nan), self._stack
      )
    self._aside.pop(rank, None)
    self._lost.add(rank)

  def holds(self, rank: int) -> bool:
    known = rank in self._mesh or rank in self._aside
    return known and rank not in self._lost

  def _check(self, rank: int) -> None:
    if not self.holds(rank):
      raise LostRankError(f"rank {rank} is gone: its memory can't be used")

  def _slice(self, rank: int) -> Tree:
    """What a rank holds, [L, 1, ...]."""
    self._check(rank)
    if rank in self._aside:
      return self._aside[rank]
    i = self._mesh.index(rank)
    return jax.tree.map(lambda x: x[:, i : i + 1], self._stack)

  def write_slot(self, rank: int, slot: int, weights: Tree) -> None:
    self._check(rank)
    new = jax.tree.map(jnp.asarray, weights)
    if rank in self._aside:
      held = self._aside[rank]
      held["experts"] = self._write(held["experts"], new, 0, slot)
    else:
      i = self._mesh.index(rank)
      self._stack["experts"] = self._write(
        self._stack["experts"], new, i, slot
      )

  def read_slot(self, rank: int, slot: int) -> Tree:
    experts = self._slice(rank)["experts"]
    return jax.tree.map(lambda x: np.asarray(x[:, 0, slot]), experts)

  def read_row(self, rank: int, row: int, tokens: int) -> np.ndarray:
    cache = self._slice(rank)["cache"]
    return np.array(cache[:, 0, row, :, :tokens])

  def write_row(self, rank: int, row: int, kv: np.ndarray) -> None:
    self._check(rank)
    if rank not in self._mesh:
      raise ValueError(f"rank {rank} is not in the mesh {self._mesh}")
    i, width = self._mesh.index(rank), self.shape.options.chunk
    for start in range(0, kv.shape[2], width):
      part = kv[:, :, start : start + width]
      pad = ((0, 0), (0, 0), (0, width - part.shape[2]), (0, 0))
      self._stack["cache"] = self._write_row(
        self._stack["cache"], np.pad(part, pad), i, row, start
      )

  def warm_rank_programs(self) -> None:
    for rank in [r for r in self._mesh if r not in self._lost]:
      self.write_slot(rank, 0, self.read_slot(rank, 0))
    self.wait()

  def wait(self) -> None:
    jax.block_until_ready((self._stack, self._aside))

  # -- the mesh

  def _bind(self, mesh: Mesh) -> Tree:
    """The stack of a mesh; ranks that leave it are put aside."""
    if mesh != self._mesh:
      stack = self._stacked(mesh)
      kept = [r for r in self._mesh if r not in mesh and r not in self._lost]
      aside = {r: self._slice(r) for r in kept}
      for rank in mesh:
        self._aside.pop(rank, None)
      self._aside.update(aside)
      self._mesh, self._stack = mesh, stack
    return self._stack

  def _stacked(self, mesh: Mesh) -> Tree:
    slices = [self._slice(r) for r in mesh]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *slices)

  def put_routing(self, mesh: Mesh, routing: Tree) -> Tree:
    del mesh
    return jax.device_put(routing, self.devices[0])

  def program(
    self, mesh: Mesh, width: int
  ) -> tuple[jax.stages.Compiled, Source]:
    return self.executables.step(width, [self.devices[r] for r in mesh])

  def run(
    self, mesh: Mesh, width: int, routing: Tree, ints: np.ndarray
  ) -> tuple[jax.Array, np.ndarray, jax.Array]:
    return self._run(self._bind(mesh), mesh, width, routing, ints)

  def _run(
    self, stack: Tree, mesh: Mesh, width: int, routing: Tree, ints: np.ndarray
  ) -> tuple[jax.Array, np.ndarray, jax.Array]:
    program, _ = self.program(mesh, width)
    packed = jax.device_put(ints, self.devices[0])
    params = with_experts(self._dense, stack["experts"])
    delta, tokens = program(params, stack["cache"], routing, packed)
    jax.block_until_ready(delta)
    return delta, np.asarray(tokens), packed

  def commit(
    self, mesh: Mesh, width: int, delta: jax.Array, ints: jax.Array
  ) -> None:
    assert mesh == self._mesh
    self._stack["cache"] = self._commit[width](
      self._stack["cache"], delta, ints
    )

  def make_ready(self, mesh: Mesh, width: int, routing: Tree) -> Source:
    """Loads a mesh's programs and runs them once, on a copy of its ranks."""
    _, source = self.program(mesh, width)
    options = self.shape.options
    ints = np.zeros((len(mesh), batch_width(options, width)), np.int32)
    ints[:, options.rows : 2 * options.rows] = -1
    stack = self._stacked(mesh)
    routing = self.put_routing(mesh, routing)
    delta, _, packed = self._run(stack, mesh, width, routing, ints)
    jax.block_until_ready(self._commit[width](stack["cache"], delta, packed))
    return source


def _commit_all(
  options: StepOptions, chunk: int, cache: jax.Array, delta: jax.Array,
  ints: jax.Array,
) -> jax.Array:  # fmt: skip
  """The commit of every rank, [L, R, ...] along axis 1."""
  commit = commit_chunk if chunk else commit_rows

  def one(
    cache: jax.Array, delta: jax.Array, ints: jax.Array
  ) -> jax.Array:
    return commit(options, cache[:, None], delta[:, None], ints[None])[:, 0]

  return jax.vmap(one, in_axes=(1, 1, 0), out_axes=1)(cache, delta, ints)


def _write_slot_of(experts: Tree, new: Tree, rank: Any, slot: Any) -> Tree:
  one = jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, rank, 1, axis=1), experts
  )
  one = write_slot(one, new, jnp.int32(slot))
  put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, rank, axis=1)
  return jax.tree.map(put, experts, one)


def _write_row_of(
  cache: jax.Array, kv: jax.Array, rank: Any, row: Any, start: Any
) -> jax.Array:
  """KV [L, 2K, width, d] into a row of a rank, behind `start`."""
  zero = jnp.int32(0)
  index = (zero, rank, row, zero, start, zero)
  return jax.lax.dynamic_update_slice(cache, kv[:, None, None], index)
