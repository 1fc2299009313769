"""Where expert weights can be read from, nearest tier first."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.params import describe, is_spec
from resilient_moe.recovery.actions import Move
from resilient_moe.recovery.view import Tier
from resilient_moe.runtime.checkpoints import open_checkpoint

ALIGN_BYTES = 64
Tree = dict[str, Any]
ReadPeer = Callable[[int, int], Tree]  # (rank, expert) -> weights


class WeightTiers:
  """A checkpoint on disk and, if the policy stands for it, in host memory."""

  def __init__(
    self,
    checkpoint: str | os.PathLike[str],
    dtype: str = "",
    host_copy: bool = True,
  ) -> None:
    """Reads the dense weights, and the experts that are kept.

    Args:
      checkpoint: folder of the model, of either kind.
      dtype: of the weights; "": as the folder says.
      host_copy: whether the experts stay in host memory.
    """
    self._reader = open_checkpoint(checkpoint, dtype)
    self.config: ModelConfig = self._reader.config
    self.dense: Tree = jax.tree.map(_aligned, self._reader.dense())
    self._host: dict[int, Tree] = {}
    if host_copy:
      for expert in range(self.config.n_experts):
        self._host[expert] = jax.tree.map(
          _aligned, self._reader.expert(expert)
        )
      self._reader.release()

  def expert(self, expert: int) -> Tree:
    """From host memory, or else from disk; for the filling of an engine."""
    if expert in self._host:
      return self._host[expert]
    return jax.tree.map(_aligned, self._reader.expert(expert))

  def slots(self, held: Iterable[int]) -> Iterator[Tree | None]:
    """The weights of each slot, one at a time; -1: an empty one."""
    for expert in held:
      yield self.expert(expert) if expert >= 0 else None

  def filled(self) -> None:
    """Every slot has its weights: what the reader holds is freed."""
    self._reader.release()

  @property
  def structure(self) -> jax.tree_util.PyTreeDef:
    """Of an expert's tree."""
    return jax.tree.structure(describe(self.config)["experts"], is_leaf=is_spec)

  def drop_host_copy(self) -> None:
    """Frees the host's copy of the experts: disk is the next tier."""
    self._host = {}

  @property
  def in_host_memory(self) -> bool:
    return bool(self._host)

  @property
  def host_bytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self._host))

  def read(
    self, moves: Iterable[Move], tier: Tier, peer: ReadPeer
  ) -> dict[int, Tree]:
    """The weights that `moves` need from a tier: expert -> [L, ...] leaves.

    Raises:
      ValueError: the tier doesn't have them.
    """
    moves = list(moves)
    if tier in (Tier.PEER, Tier.LOCAL):
      return {m.expert: peer(m.source, m.expert) for m in moves}
    experts = sorted({m.expert for m in moves})
    if tier == Tier.HOST:
      if missing := [e for e in experts if e not in self._host]:
        raise ValueError(f"experts {missing} are not in host memory")
      return {e: self._host[e] for e in experts}
    if tier == Tier.DISK:
      return self._reader.experts(experts)
    raise ValueError(
      f"tier {tier.value!r} is not part of this runtime; choose from "
      "local, peer, host, disk"
    )


def _aligned(x: np.ndarray) -> np.ndarray:
  """The same at an address that JAX on CPU takes as it is.

  `device_put` copies a host array that doesn't start at a multiple of 64
  bytes, some 20 times slower than `memcpy` (jax 0.10.2).
  """
  if x.ctypes.data % ALIGN_BYTES == 0 and x.flags.c_contiguous:
    return x
  raw = np.empty(x.nbytes + ALIGN_BYTES, np.uint8)
  start = -raw.ctypes.data % ALIGN_BYTES
  copy = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
  copy[...] = x
  return copy


def tree_bytes(tree: Tree) -> int:
  """Bytes of all leaves."""
  return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))
