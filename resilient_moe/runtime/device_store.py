"""What the ranks of this process hold, one set of arrays per device.

All ranks of the emulated runtime, one of a worker's in the process runtime:
programs span every rank of a mesh, arrays are those of the ranks held here.

The per-rank arrays are the truth; global arrays for a step are views made of
them (`make_array_from_single_device_arrays` copies nothing). So a loss is the
deletion of one rank's arrays, and a new mesh is a new list of the others.
(Deleting one shard of a live global array instead kills the process:
`jax_facts.md`, "Traps".)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from resilient_moe.mesh.executables import Executables, Source
from resilient_moe.mesh.programs import (
  InstanceShape,
  make_mesh,
  step_specs,
  with_experts,
)
from resilient_moe.runtime.rank_arrays import (
  idle_batch,
  idle_delta,
  put_cache,
  put_dense,
  put_experts,
  read_row,
  read_slot,
  write_row,
  write_slot,
)

Tree = dict[str, Any]


class LostRankError(RuntimeError):
  """Something tried to use the memory of a rank that is gone."""


class DeviceStore:
  """Weights, slots and KV of each rank on its own device."""

  def __init__(
    self, shape: InstanceShape, devices: Sequence[jax.Device],
    executables: Executables,
  ) -> None:  # fmt: skip
    self.shape = shape
    self.devices = list(devices)  # by rank
    self.executables = executables
    self._dense: dict[int, Tree] = {}
    self._experts: dict[int, Tree] = {}
    self._cache: dict[int, jax.Array] = {}
    self._programs: dict[int, dict[str, jax.stages.Compiled]] = {}
    self._lost: set[int] = set()
    self._bound: tuple | None = None  # (mesh, params, shardings)

  # -- contents of a rank

  def add(
    self, rank: int, dense: Tree, slots: Iterable[Tree | None]
  ) -> None:
    """Fills a rank: dense weights, and an expert's tree for each slot."""
    device = self.devices[rank]
    programs = self.executables.rank_programs(device)
    self._programs[rank] = programs
    self._dense[rank] = put_dense(dense, device)
    self._experts[rank] = put_experts(
      self.shape, slots, device, programs["write_slot"]
    )
    self._cache[rank] = put_cache(self.shape, device)
    self._lost.discard(rank)
    self._bound = None

  def lose(self, rank: int) -> None:
    """Deletes all that the rank held; any later use of it is an error."""
    self._check(rank)
    self._bound = None  # global views first (see the module's docstring)
    trees = (
      self._dense.pop(rank), self._experts.pop(rank), self._cache.pop(rank)
    )  # fmt: skip
    jax.block_until_ready(trees)
    for array in jax.tree.leaves(trees):
      array.delete()
    self._lost.add(rank)

  def holds(self, rank: int) -> bool:
    """Whether the rank's memory is there."""
    return rank in self._cache

  def _check(self, rank: int) -> None:
    if rank in self._lost or rank not in self._cache:
      raise LostRankError(f"rank {rank} is gone: its memory can't be used")

  def write_slot(self, rank: int, slot: int, weights: Tree) -> None:
    """One expert's weights ([L, ...] leaves, host or device) into a slot."""
    self._check(rank)
    self._bound = None
    self._experts[rank] = write_slot(
      self._experts[rank], self._programs[rank]["write_slot"], slot, weights,
      self.devices[rank],
    )  # fmt: skip

  def read_slot(self, rank: int, slot: int) -> Tree:
    """An expert's weights as they lie on a rank, [L, ...] leaves."""
    self._check(rank)
    return read_slot(self._experts[rank], slot)

  def read_row(self, rank: int, row: int, tokens: int) -> np.ndarray:
    """KV of a request, [L, 2K, tokens, d], copied to the host."""
    self._check(rank)
    return read_row(self._cache[rank], row, tokens)

  def write_row(self, rank: int, row: int, kv: np.ndarray) -> None:
    """KV [L, 2K, tokens, d] into a row, through the commit program."""
    self._check(rank)
    program = self._programs[rank][f"commit{self.shape.options.chunk}"]
    self._cache[rank] = write_row(
      self.shape, self._cache[rank], program, row, kv, self.devices[rank]
    )

  def warm_rank_programs(self) -> None:
    """Runs each rank's own programs once, leaving its contents as they are."""
    for rank, device in enumerate(self.devices):
      if rank not in self._cache:
        continue
      for width in self.shape.chunks():
        ints = idle_batch(self.shape, 1, width)
        delta = idle_delta(self.shape, width)
        arrays = jax.device_put((delta, ints), device)
        commit = self._programs[rank][f"commit{width}"]
        self._cache[rank] = commit(self._cache[rank], *arrays)
      self.write_slot(rank, 0, self.read_slot(rank, 0))
    self.wait()

  def wait(self) -> None:
    """Blocks until everything that was dispatched is done."""
    jax.block_until_ready((self._experts, self._cache))

  # -- the mesh

  def _bind(self, mesh: tuple[int, ...]) -> tuple[Tree, tuple]:
    """Global parameter views over `mesh`, and the arguments' shardings."""
    if self._bound is None or self._bound[0] != mesh:
      for rank in self._mine(mesh):
        self._check(rank)
      self._bound = (mesh, *self._make_views(mesh))
    return self._bound[1], self._bound[2]

  def unbind(self) -> None:
    """Devices of ranks have changed: views of meshes are made anew."""
    self._bound = None

  def _mine(self, mesh: tuple[int, ...]) -> tuple[int, ...]:
    """The members whose device is one of this process, in mesh order."""
    here = jax.process_index()
    return tuple(r for r in mesh if self.devices[r].process_index == here)

  def _make_views(self, mesh: tuple[int, ...]) -> tuple[Tree, tuple]:
    devices = make_mesh([self.devices[r] for r in mesh])
    shardings = jax.tree.map(
      lambda spec: NamedSharding(devices, spec), step_specs(self.shape)[0]
    )
    everywhere = shardings[2]["table"]
    by_rank = shardings[1]
    dense = jax.tree.map(
      lambda *x: _assemble(x[0].shape, everywhere, x),
      *[self._dense[r] for r in self._mine(mesh)],
    )
    experts = jax.tree.map(
      lambda *x: _assemble(_widened(x[0].shape, len(mesh)), by_rank, x),
      *[self._experts[r] for r in self._mine(mesh)],
    )
    return with_experts(dense, experts), shardings

  def put_routing(self, mesh: tuple[int, ...], routing: Tree) -> Tree:
    """The routing table on every device of the mesh."""
    shardings = self._bind(mesh)[1][2]
    devices = [self.devices[r] for r in self._mine(mesh)]
    # `device_put` onto other processes' devices would compare the values.
    copies = lambda x, on: _assemble(
      x.shape, on, [jax.device_put(x, d) for d in devices]
    )
    return jax.tree.map(copies, routing, shardings)

  def program(
    self, mesh: tuple[int, ...], width: int
  ) -> tuple[jax.stages.Compiled, Source]:
    """The step program of a mesh."""
    return self.executables.step(width, [self.devices[r] for r in mesh])

  def run(
    self, mesh: tuple[int, ...], width: int, routing: Tree, ints: np.ndarray
  ) -> tuple[jax.Array, np.ndarray, jax.Array]:
    """One step, waited for: delta, tokens, the packed batch.

    `ints` and the tokens [., B + 1] are those of the ranks held here.
    """
    params, shardings = self._bind(mesh)
    program, _ = self.program(mesh, width)
    mine = self._mine(mesh)
    cache = [self._cache[r] for r in mine]
    shape = _widened(cache[0].shape, len(mesh))
    packed = self._put_rows(mesh, mine, ints, shardings[3])
    delta, tokens = program(
      params, _assemble(shape, shardings[1], cache), routing, packed
    )
    jax.block_until_ready(delta)
    if len(mine) == len(mesh):
      return delta, np.asarray(tokens), packed
    parts = [tokens.addressable_data(i) for i in range(len(mine))]
    return delta, np.concatenate([np.asarray(p) for p in parts]), packed

  def _put_rows(
    self, mesh: tuple[int, ...], mine: tuple[int, ...], ints: np.ndarray,
    sharding: Any,
  ) -> jax.Array:  # fmt: skip
    """A batch's rows, each on its rank's device."""
    if len(mine) == len(mesh):
      return jax.device_put(ints, sharding)
    rows = [
      jax.device_put(ints[i : i + 1], self.devices[r])
      for i, r in enumerate(mine)
    ]
    return _assemble((len(mesh), ints.shape[1]), sharding, rows)

  def commit(
    self, mesh: tuple[int, ...], width: int, delta: jax.Array, ints: jax.Array
  ) -> None:
    """Scatters a step's delta into the (donated) cache of each rank."""
    for place, rank in enumerate(self._mine(mesh)):
      self._check(rank)
      commit = self._programs[rank][f"commit{width}"]
      self._cache[rank] = commit(
        self._cache[rank],
        delta.addressable_data(place),
        ints.addressable_data(place),
      )

  def make_ready(
    self, mesh: tuple[int, ...], width: int, routing: Tree
  ) -> Source:
    """Loads a mesh's program and runs it once, on idle rows; no commit."""
    _, source = self.program(mesh, width)
    ints = idle_batch(self.shape, len(self._mine(mesh)), width)
    kept, self._bound = self._bound, None
    self.run(mesh, width, self.put_routing(mesh, routing), ints)
    self._bound = kept
    return source


def _widened(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
  """The global shape of `n` per-rank arrays: axis 1 is the rank axis."""
  return (shape[0], n, *shape[2:])


def _assemble(shape: tuple[int, ...], sharding: Any, arrays: Any) -> jax.Array:
  return jax.make_array_from_single_device_arrays(
    shape, sharding, list(arrays)
  )
