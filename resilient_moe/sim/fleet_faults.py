"""What breaks in a fleet over a month: one seeded draw, the same for all.

The draw doesn't depend on policies, so that they are compared under the same
faults. A device that is away can't break; what takes its place can.
"""

import dataclasses
import heapq

import numpy as np

from resilient_moe.sim.failure_rates import (
  DAY_S,
  DOMAINS,
  FailureModel,
  lognormal,
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the devices of equal groups stand; a group begins with a host."""

  groups: int
  ranks: int  # of a group, spares included
  devices_per_host: int = 8
  hosts_per_rack: int = 4

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value < 1:
        raise ValueError(f"layout {field.name}={value}: at least 1")

  @property
  def hosts_per_group(self) -> int:
    return -(-self.ranks // self.devices_per_host)

  @property
  def hosts(self) -> int:
    return self.groups * self.hosts_per_group

  @property
  def racks(self) -> int:
    return -(-self.hosts // self.hosts_per_rack)

  @property
  def devices(self) -> int:
    return self.groups * self.ranks

  def on_host(self, host: int) -> list[tuple[int, int]]:
    """(group, rank) of a host's devices; its last places may be empty."""
    group, index = divmod(host, self.hosts_per_group)
    first = index * self.devices_per_host
    last = min(first + self.devices_per_host, self.ranks)
    return [(group, rank) for rank in range(first, last)]

  def on_rack(self, rack: int) -> list[tuple[int, int]]:
    """(group, rank) of a rack's devices."""
    first = rack * self.hosts_per_rack
    last = min(first + self.hosts_per_rack, self.hosts)
    return [p for host in range(first, last) for p in self.on_host(host)]

  def rack_offset(self, group: int) -> int:
    """How many hosts of its first rack stand before a group."""
    return group * self.hosts_per_group % self.hosts_per_rack


@dataclasses.dataclass(frozen=True)
class Strike:
  """Ranks of one group die at once, for one cause."""

  t_s: float
  domain: str
  ranks: tuple[int, ...]
  back_s: tuple[float, ...]  # when the place of each has a device again


@dataclasses.dataclass(frozen=True)
class Slow:
  """A rank of one group is slow for a while."""

  t_s: float
  rank: int
  slowdown: float
  until_s: float


@dataclasses.dataclass(frozen=True)
class FaultTrace:
  """What strikes each group, in order of time."""

  strikes: dict[int, list[Strike]]  # by group; who isn't struck is absent
  slows: dict[int, list[Slow]]
  failures: int  # that struck anybody; a rack's counts one

  @property
  def struck(self) -> list[int]:
    """Groups to which anything happens, ascending."""
    return sorted(set(self.strikes) | set(self.slows))


def draw(
  layout: Layout, model: FailureModel, days: float, rng: np.random.Generator
) -> FaultTrace:
  """All faults of `days` days."""
  n = rng.poisson(model.expected_failures(layout.devices, days))
  times = np.sort(rng.uniform(0, days * DAY_S, n))
  weights = [model.fractions.get(domain, 0.0) for domain in DOMAINS]
  domain = rng.choice(len(DOMAINS), n, p=np.array(weights) / sum(weights))
  where = rng.uniform(0, 1, n)
  repair = model.repair
  slow = lognormal(rng, repair.median_s, repair.sigma, n)
  rack = lognormal(rng, repair.rack_median_s, repair.sigma, n)
  pool = _Pool(round(repair.pool_fraction * layout.devices), repair.swap_s)
  away: dict[tuple[int, int], float] = {}
  strikes: dict[int, list[Strike]] = {}
  failures = 0
  for i in range(n):
    kind, t = DOMAINS[domain[i]], float(times[i])
    places = _places(layout, kind, where[i])
    present = [p for p in places if away.get(p, 0.0) <= t]
    for place in present:
      if kind == "process":
        away[place] = t
      elif kind == "rack":  # its devices are sound, and wait for it
        away[place] = t + float(rack[i])
      else:
        away[place] = pool.replace(t, float(slow[i]))
    failures += bool(present)
    for group in sorted({group for group, _ in present}):
      ranks = tuple(rank for g, rank in present if g == group)
      back = tuple(away[group, rank] for rank in ranks)
      strikes.setdefault(group, []).append(Strike(t, kind, ranks, back))
  return FaultTrace(strikes, _draw_slows(layout, model, days, rng), failures)


def _places(
  layout: Layout, domain: str, where: float
) -> list[tuple[int, int]]:
  """(group, rank) of the part that `where` in [0, 1) chooses."""
  if domain == "rack":
    return layout.on_rack(int(where * layout.racks))
  if domain == "host":
    return layout.on_host(int(where * layout.hosts))
  return [divmod(int(where * layout.devices), layout.ranks)]


def _draw_slows(
  layout: Layout, model: FailureModel, days: float, rng: np.random.Generator
) -> dict[int, list[Slow]]:
  """Stragglers, by group."""
  kind = model.stragglers
  n = rng.poisson(model.expected_stragglers(layout.devices, days))
  times = np.sort(rng.uniform(0, days * DAY_S, n))
  device = rng.integers(0, layout.devices, n)
  lasts = lognormal(rng, kind.median_s, kind.sigma, n)
  found: dict[int, list[Slow]] = {}
  for t, who, last in zip(
    times.tolist(), device.tolist(), lasts.tolist(), strict=True
  ):
    group, rank = divmod(who, layout.ranks)
    until_s = t + min(last, kind.longest_s)
    found.setdefault(group, []).append(Slow(t, rank, kind.slowdown, until_s))
  return found


class _Pool:
  """Devices that stand by for the whole fleet, by when they are free."""

  def __init__(self, devices: int, swap_s: float) -> None:
    self._free = [0.0] * devices
    self._swap_s = swap_s

  def replace(self, t_s: float, repair_s: float) -> float:
    """When a device that broke at `t_s` has a successor in place."""
    heapq.heappush(self._free, t_s + repair_s)  # it joins them, repaired
    return max(t_s, heapq.heappop(self._free)) + self._swap_s
