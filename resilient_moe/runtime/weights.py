"""Where expert weights can be read from, nearest tier first."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from resilient_moe.model.checkpoint import load_experts, load_host
from resilient_moe.model.config import ModelConfig
from resilient_moe.recovery.actions import Move
from resilient_moe.recovery.view import Tier

ALIGN_BYTES = 64
Tree = dict[str, Any]
ReadPeer = Callable[[int, int], Tree]  # (rank, expert) -> weights


class WeightTiers:
  """A checkpoint on disk and, if the policy stands for it, in host memory."""

  def __init__(self, checkpoint: pathlib.Path) -> None:
    self._path = checkpoint
    self.config: ModelConfig
    self.config, tree = load_host(checkpoint)
    self.dense: Tree = tree["dense"]
    self._host = {
      int(name): jax.tree.map(_aligned, t)
      for name, t in tree["experts"].items()
    }

  def expert(self, expert: int) -> Tree:
    """From host memory: only while loading, or when it is kept."""
    return self._host[expert]

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
      return load_experts(self._path, self.config, experts)
    raise ValueError(
      f"tier {tier.value!r} is not part of this runtime; choose from "
      "local, peer, host, disk"
    )


def _aligned(x: np.ndarray) -> np.ndarray:
  """A copy at an address that JAX on CPU takes as it is.

  `device_put` copies a host array that doesn't start at a multiple of 64
  bytes, some 20 times slower than `memcpy` (jax 0.10.2).
  """
  raw = np.empty(x.nbytes + ALIGN_BYTES, np.uint8)
  start = -raw.ctypes.data % ALIGN_BYTES
  copy = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
  copy[...] = x
  return copy


def tree_bytes(tree: Tree) -> int:
  """Bytes of all leaves."""
  return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))
