"""What an expert rank (EW) holds, and what it computes for a parcel."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.mesh.split_programs import buckets
from resilient_moe.runtime import rank_arrays

Tree = dict[str, Any]


# Outputs that may still be computed, each with how many rows of it count.
Begun = list[tuple[jax.Array, int]]


def read(begun: Begun) -> np.ndarray:
  """Waits for outputs, [m, D]."""
  parts = [np.asarray(y)[:m] for y, m in begun]
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


class ExpertRank:
  """Slots of experts on one device; knows nothing of requests."""

  def __init__(
    self, shape: InstanceShape, device: jax.Device,
    programs: Mapping[str, Any], slots: Iterable[Tree | None],
    held: Sequence[int],
  ) -> None:  # fmt: skip
    """`held`: the expert in each slot, whose weights are `slots`; -1: none."""
    self.shape = shape
    self.device = device
    self._programs = programs
    self._sizes = buckets(shape)
    self._experts = rank_arrays.put_experts(
      shape, slots, device, programs["write_slot"]
    )
    # Parcels name experts, so that a table that is out of date can't make
    # this rank compute with what a slot holds by now.
    self._held = np.array(held, np.int32)
    self._index()

  def _index(self) -> None:
    """Where each expert is; of several copies here any does."""
    slot_of = np.full(self.shape.config.n_experts, -1, np.int32)
    slots = np.flatnonzero(self._held >= 0)
    slot_of[self._held[slots]] = slots
    self._slot_of = slot_of

  def compute(
    self, layer: int, rows: np.ndarray, token: np.ndarray, expert: np.ndarray
  ) -> np.ndarray:
    """Each assignment's expert output, [m, D], unsummed; see `begin`."""
    return read(self.begin(layer, rows, token, expert))

  def begin(
    self, layer: int, rows: np.ndarray, token: np.ndarray, expert: np.ndarray
  ) -> Begun:
    """The same without waiting: other ranks' devices work side by side.

    Args:
      layer: the MoE layer.
      rows: [n, D] embeddings.
      token: [m] int32, the row of each assignment.
      expert: [m] int32, its expert.

    Raises:
      LookupError: it isn't here, or not any more.
    """
    slot = self._slot_of[expert]
    if (slot < 0).any():
      gone = sorted(set(np.asarray(expert)[slot < 0].tolist()))
      raise LookupError(f"experts {gone} are not held here")
    most = self._sizes[-1]
    return [
      self._part(layer, rows, token[i : i + most], slot[i : i + most])
      for i in range(0, len(token), most)
    ]

  def _part(
    self, layer: int, rows: np.ndarray, token: np.ndarray, slot: np.ndarray
  ) -> tuple[jax.Array, int]:
    """At most as many assignments as the largest program takes.

    Returns the outputs, padded and perhaps still computed, and their number.
    """
    m = len(token)
    if len(rows) > m:  # rows of other parts
      used, token = np.unique(token, return_inverse=True)
      rows = rows[used]
    size = next(s for s in self._sizes if s >= m)
    padded = np.zeros((size, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    tokens = np.zeros(size, np.int32)
    tokens[:m] = token
    slots = np.full(size, self.shape.slots, np.int32)  # no expert
    slots[:m] = slot
    # NumPy's arrays go in as they are: a `device_put` each costs more.
    y = self._programs[f"experts{size}"](
      self._experts, np.int32(layer), padded, tokens, slots
    )
    return y, m

  def write_slot(self, slot: int, expert: int, weights: Tree) -> None:
    """One expert's weights ([L, ...] leaves) into a slot."""
    self._held[slot] = expert
    self._index()
    self._experts = rank_arrays.write_slot(
      self._experts, self._programs["write_slot"], slot, weights, self.device
    )

  def read_slot(self, slot: int) -> Tree:
    """An expert's weights, [L, ...] leaves."""
    return rank_arrays.read_slot(self._experts, slot)

  def warm(self) -> None:
    """Runs every program once."""
    for size in self._sizes:
      rows = np.zeros(
        (size, self.shape.config.d_model), self.shape.config.dtype
      )
      index = np.zeros(size, np.int32)
      self._part(0, rows, index, index)
    self.write_slot(0, int(self._held[0]), self.read_slot(0))
    self.wait()

  def wait(self) -> None:
    jax.block_until_ready(self._experts)

  def delete(self) -> None:
    """The rank is lost: any later use of its arrays is an error."""
    for array in jax.tree.leaves(self._experts):
      array.delete()
