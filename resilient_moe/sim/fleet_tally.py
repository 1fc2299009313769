"""What a group's month comes to: times, stalls, tokens, one line a recovery."""

import dataclasses
from typing import Any

from resilient_moe.sim.fleet_queue import Counts

FULL = 0.995  # of the healthy capacity: full service


@dataclasses.dataclass
class Tally:
  """Sums of one group, or of many."""

  full_s: float = 0.0
  degraded_s: float = 0.0
  zero_s: float = 0.0
  capacity_s: float = 0.0  # times the part of the healthy capacity
  failures: int = 0  # reported losses of ranks
  ranks_lost: int = 0
  plans: int = 0
  abandoned: int = 0  # plans that another failure replaced
  fallbacks: int = 0  # recoveries that the policy left to a restart
  planned_restarts: int = 0  # to bring repaired devices back
  outages: int = 0  # too few devices were left
  drained: int = 0  # stragglers that the policy took out
  requests_lost: float = 0.0
  tokens_lost: float = 0.0  # emitted by those
  tokens_recomputed: float = 0.0
  weight_bytes: float = 0.0
  kv_bytes: float = 0.0
  late_requests: float = 0.0  # whom a stall made too slow for the objective
  late_tokens: float = 0.0
  counts: Counts = dataclasses.field(default_factory=Counts)
  stalls: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  # (seconds, requests that it stopped), by failures
  pauses: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  # likewise, as was planned: who joins, and restarts that bring devices back
  records: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def add(self, other: "Tally") -> None:
    """Adds another group's."""
    for field in dataclasses.fields(self):
      mine, theirs = getattr(self, field.name), getattr(other, field.name)
      if field.name == "counts":
        mine.add(theirs)
      elif isinstance(mine, list):
        mine.extend(theirs)
      else:
        setattr(self, field.name, mine + theirs)

  def pass_s(self, seconds: float, capacity: float, healthy: float) -> None:
    """So many seconds went by at this capacity."""
    self.capacity_s += seconds * min(max(capacity, 0.0) / healthy, 1.0)
    if capacity <= 0:
      self.zero_s += seconds
    elif capacity >= FULL * healthy:
      self.full_s += seconds
    else:
      self.degraded_s += seconds
