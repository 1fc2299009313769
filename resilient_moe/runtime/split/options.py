"""How attention and expert ranks talk: the `exchange` part of a case."""

import dataclasses

from resilient_moe.datapath.gather import GatherLimits
from resilient_moe.datapath.healing import HealingLimits


@dataclasses.dataclass(frozen=True)
class ExchangeOptions:
  """Fields of `case.exchange`.

  Attributes:
    dedup: a token travels once to an expert rank, not once an expert.
    late_s, misses, link_s, push_s, tick_s: `datapath.HealingLimits`.
    min_rows, wait_s: `datapath.GatherLimits`, of expert ranks.
    stores: processes that keep KV checkpoints.
    trace: record who computes what when (spans/ in the run's folder).
  """

  dedup: bool = True
  late_s: float = HealingLimits.late_s
  misses: int = HealingLimits.misses
  link_s: float = HealingLimits.link_s
  push_s: float = HealingLimits.push_s
  tick_s: float = HealingLimits.tick_s
  min_rows: int = GatherLimits.min_rows
  wait_s: float = GatherLimits.wait_s
  stores: int = 1
  trace: bool = False

  def __post_init__(self) -> None:
    if self.stores < 1:
      raise ValueError(f"exchange.stores={self.stores}: at least 1")
    self.healing()
    self.gathering()

  def healing(self) -> HealingLimits:
    """What attention ranks wait for."""
    return HealingLimits(
      self.late_s, self.misses, self.link_s, self.push_s, self.tick_s
    )

  def gathering(self) -> GatherLimits:
    """What expert ranks wait for."""
    return GatherLimits(self.min_rows, self.wait_s)
