"""How often things break, as named data with sources.

A rate counts independent failures in days of a node of eight devices. The
published ones differ by a factor of 35, and two of one paper contradict each
other, so a study names the one it uses (`RATES`). Which part breaks comes from
one breakdown (`LLAMA3_CAUSES`): all of a failure domain goes together.
"""

import dataclasses
import math
import types
from collections.abc import Mapping

import numpy as np

NODE_DEVICES = 8
DAY_S = 86_400.0
DOMAINS = ("device", "host", "rack", "process")


@dataclasses.dataclass(frozen=True)
class Rate:
  """Failures of all domains together, in days of an eight-device node."""

  name: str
  per_node_day: float
  source: str


_RSC = "Kokolis et al., HPCA 2025 (arXiv 2410.21680)"
RATES: Mapping[str, Rate] = types.MappingProxyType(
  {
    rate.name: rate
    for rate in (
      Rate("rsc1", 6.50e-3, f"{_RSC}: RSC-1, 6.50 in 1000 node-days"),
      Rate("rsc2", 2.34e-3, f"{_RSC}: RSC-2, 2.34 in 1000 node-days"),
      Rate(
        "rsc_mttf",
        24 / 7.9 / (1024 / NODE_DEVICES),
        f"{_RSC}: one in 7.9 h on 1024 GPUs. Contradicts `rsc1`, which "
        "gives one in 28.8 h there; never mixed with it",
      ),
      Rate(
        "llama3",
        419 / 54 / (16_384 / NODE_DEVICES),
        "The Llama 3 Herd of Models (arXiv 2407.21783): 419 unexpected "
        "interruptions in 54 days on 16,384 GPUs",
      ),
      Rate(
        "nodes_2pct", 0.02 / 30, "arXiv 2407.05467: 2% of nodes a month"
      ),
      Rate(
        "nodes_5pct", 0.05 / 30, "arXiv 2407.05467: 5% of nodes a month"
      ),
      Rate("never", 0.0, "nothing breaks: the fault-free twin"),
    )
  }
)

# The Llama 3 Herd of Models, Table 5: unexpected interruptions by cause; they
# add up to 419. (The paper prints 30.1% beside 148; counts are used.)
LLAMA3_CAUSES: Mapping[str, tuple[str, int]] = types.MappingProxyType(
  {
    "faulty GPU": ("device", 148),
    "GPU HBM3 memory": ("device", 72),
    "GPU SRAM memory": ("device", 19),
    "GPU system processor": ("device", 17),
    "silent data corruption": ("device", 6),
    "GPU thermal interface and sensor": ("device", 6),
    "host maintenance": ("host", 32),
    "NIC": ("host", 7),
    "SSD": ("host", 3),
    "power supply": ("host", 3),
    "server chassis": ("host", 2),
    "IO expansion board": ("host", 2),
    "CPU": ("host", 2),
    "system memory": ("host", 2),
    # A cable takes less than a rack: the pessimistic end.
    "network switch or cable": ("rack", 35),
    "software bug": ("process", 54),
    "NCCL watchdog timeouts": ("process", 7),
    "dependency": ("process", 2),
  }
)


def llama3_fractions() -> dict[str, float]:
  """The part of failures that take each of `DOMAINS`."""
  total = sum(count for _, count in LLAMA3_CAUSES.values())
  return {
    domain: sum(n for d, n in LLAMA3_CAUSES.values() if d == domain) / total
    for domain in DOMAINS
  }


@dataclasses.dataclass(frozen=True)
class Repair:
  """When the place of a lost device is filled again.

  A part of the fleet stands by, shared by all; who takes one of them is back
  after `swap_s`, and the broken device joins those who stand by when it is
  repaired. Without any left, a place waits for the next. A process that died
  needs no other device.

  Sources: automatic replacement of a node in under 5 minutes (Crusoe
  AutoClusters); a median of 68 minutes for network faults (R2CCL, arXiv
  2512.25059), which is a rack's here. Repair of a device or host: assumed a
  day.
  """

  pool_fraction: float = 0.01  # of the fleet's devices
  swap_s: float = 300.0
  median_s: float = DAY_S
  rack_median_s: float = 68 * 60.0
  sigma: float = 1.0  # of the logarithm

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"repair {field.name}={value}: at least 0")


@dataclasses.dataclass(frozen=True)
class Stragglers:
  """Devices that are slow for a while.

  Source of the durations: Greyhound (Wu et al., USENIX ATC 2025): from under a
  minute to nearly ten hours, jobs 1.34 times as long on average. How often is
  assumed: as often as hosts fail by `rsc2`.
  """

  per_node_day: float = 2.34e-3
  slowdown: float = 1.34
  median_s: float = 600.0
  sigma: float = 1.5
  longest_s: float = 36_000.0

  def __post_init__(self) -> None:
    if not self.slowdown >= 1:
      raise ValueError(f"straggler slowdown={self.slowdown}: at least 1")
    if not self.per_node_day >= 0:
      raise ValueError(
        f"straggler per_node_day={self.per_node_day}: at least 0"
      )


@dataclasses.dataclass(frozen=True)
class FailureModel:
  """Everything that breaks, and how long it stays broken."""

  rate: Rate
  fractions: Mapping[str, float]  # by domain; they add up to 1
  repair: Repair = Repair()
  stragglers: Stragglers = Stragglers()
  multiplier: float = 1.0  # of every rate: for stress tests, named in tables

  def __post_init__(self) -> None:
    unknown = set(self.fractions) - set(DOMAINS)
    if unknown:
      raise ValueError(
        f"unknown domain {min(unknown)!r}; choices: {', '.join(DOMAINS)}"
      )
    if not np.isclose(sum(self.fractions.values()), 1):
      raise ValueError(
        f"fractions of domains add up to {sum(self.fractions.values())}, not 1"
      )
    if not self.multiplier >= 0:
      raise ValueError(f"multiplier={self.multiplier}: at least 0")

  def expected_failures(self, devices: int, days: float) -> float:
    """How many failures are drawn, stragglers apart."""
    return self.multiplier * self.rate.per_node_day * days * (
      devices / NODE_DEVICES
    )

  def expected_stragglers(self, devices: int, days: float) -> float:
    """How many devices become slow."""
    return self.multiplier * self.stragglers.per_node_day * days * (
      devices / NODE_DEVICES
    )


def failure_model(
  rate: str = "rsc1",
  fractions: Mapping[str, float] | None = None,
  repair: Repair | None = None,
  stragglers: Stragglers | None = None,
  multiplier: float = 1.0,
) -> FailureModel:
  """The model of a named rate; by default broken down as Llama 3's.

  Raises:
    ValueError: names the value, the limit and the choices.
  """
  if rate not in RATES:
    raise ValueError(f"unknown rate {rate!r}; choices: {', '.join(RATES)}")
  return FailureModel(
    RATES[rate],
    fractions or llama3_fractions(),
    repair or Repair(),
    stragglers or Stragglers(),
    multiplier,
  )


def lognormal(
  rng: np.random.Generator, median: float, sigma: float, n: int
) -> np.ndarray:
  """`n` positive numbers of this median, [n]."""
  return median * np.exp(sigma * rng.standard_normal(n))
