"""The expert half of a worker: its slots, and the desk that parcels come to.

The desk's thread computes; the main thread writes slots between two parcels.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from resilient_moe.recovery.actions import Move
from resilient_moe.recovery.view import Tier
from resilient_moe.report.spans import Spans
from resilient_moe.runtime.process.data import DataClient
from resilient_moe.runtime.process.desk import Desk
from resilient_moe.runtime.process.wire import Address, SplitSetup
from resilient_moe.runtime.split.experts import ExpertRank
from resilient_moe.runtime.weights import WeightTiers, tree_bytes

Reached = Callable[[str, int], None]  # (place, layer): where a fault may be


class Holding:
  """Experts, if the worker holds some at present, and who asks for them."""

  def __init__(
    self, rank: int, setup: SplitSetup, authkey: bytes, host: str,
    weights: WeightTiers, reached: Reached, spans: Spans,
  ) -> None:  # fmt: skip
    self._rank, self._weights = rank, weights
    self._reached, self._spans = reached, spans
    self._lock = threading.Lock()  # of the experts' arrays
    self._experts: ExpertRank | None = None
    self._structure = weights.structure
    self.desk = Desk(
      host, authkey, self._compute, setup.exchange.gathering(), self._on_batch
    )

  def hold(
    self, setup: SplitSetup, device: jax.Device, programs: dict[str, Any],
    slots: Sequence[int],
  ) -> None:  # fmt: skip
    """Takes these experts over, one a slot; -1: empty."""
    held = self._weights.slots(slots)
    experts = ExpertRank(setup.shape, device, programs, held, slots)
    experts.warm()
    self._experts = experts

  def drop(self) -> None:
    """Holds no experts any more."""
    with self._lock:
      self._experts = None

  def fill(
    self, slot: int, expert: int, tier: str,
    source: tuple[Address, int] | None, client: Callable[..., DataClient],
  ) -> int:  # fmt: skip
    """An expert's weights into a slot; bytes."""
    tree: Any
    if tier == Tier.LOCAL:
      assert source is not None
      tree = self._held().read_slot(source[1])
    elif tier == Tier.PEER:
      assert source is not None
      leaves = client(source[0]).pull("slot", source[1])
      tree = jax.tree.unflatten(self._structure, leaves)
    else:
      move = Move(expert, self._rank, slot)
      tree = self._weights.read([move], Tier(tier), _no_peer)[expert]
    with self._lock:
      self._held().write_slot(slot, expert, tree)
      self._held().wait()
    return tree_bytes(tree)

  def read_slot(self, slot: int) -> list[np.ndarray]:
    """An expert's weights as a peer pulls them."""
    with self._lock:
      return jax.tree.leaves(self._held().read_slot(slot))

  def link(self, rank: int, cut: bool, delay_s: float) -> None:
    """A fault, or its end: what is wrong with the link to an AW."""
    self.desk.restore(rank)
    if cut:
      self.desk.cut(rank)
    if delay_s:
      self.desk.delay(rank, delay_s)

  def _held(self) -> ExpertRank:
    if self._experts is None:
      raise LookupError(f"rank {self._rank} holds no experts")
    return self._experts

  def _compute(
    self, layer: int, rows: np.ndarray, token: np.ndarray, expert: np.ndarray
  ) -> np.ndarray:
    self._reached("exchange", layer)
    with self._lock:
      y = self._held().compute(layer, rows, token, expert)
    self._reached("experts", layer)
    return y

  def _on_batch(
    self, layer: int, rows: int, start_s: float, end_s: float, aws: list[int]
  ) -> None:
    self._spans.add("experts", start_s, end_s, layer=layer, rows=rows, aws=aws)


def _no_peer(rank: int, expert: int) -> dict[str, Any]:
  raise LookupError(f"rank {rank} is asked for expert {expert} by `pull`")
