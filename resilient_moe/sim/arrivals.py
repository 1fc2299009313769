"""Requests over time: from a trace, or drawn with a trace's statistics.

`Load` is what the fleet study needs of either: the rate of each minute and the
lengths. `generate` draws single requests, for runs that step. The shipped
statistics are derived from Azure's public traces (`assets/
azure_statistics.json` has the attribution; CC-BY, Splitwise, ISCA 2024).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

MINUTE_S = 60.0
STATISTICS = (
  pathlib.Path(__file__).parents[1] / "assets" / "azure_statistics.json"
)
_SAMPLES = 4096  # pairs of lengths that stand for a trace's


@dataclasses.dataclass(frozen=True)
class Load:
  """What comes to a group: rates a minute, and lengths.

  `relative` has mean 1: an hour of it is repeated for as long as it takes.
  """

  name: str
  relative: np.ndarray  # [M] rate of each minute over the mean
  context: np.ndarray  # [n] prompt tokens
  generated: np.ndarray  # [n] new tokens, at least 1

  def __post_init__(self) -> None:
    if not len(self.relative) or not len(self.context):
      raise ValueError(f"load {self.name!r} of 0 minutes or 0 requests")

  @property
  def context_mean(self) -> float:
    return float(self.context.mean())

  @property
  def generated_mean(self) -> float:
    return float(self.generated.mean())

  @property
  def running_context(self) -> float:
    """Mean positions of a request in mid-decode (longer ones run longer)."""
    held = self.generated * (self.context + self.generated / 2)
    return float(held.sum() / self.generated.sum())

  def generated_below(self, tokens: float) -> tuple[float, float]:
    """Of running requests: the part asked for fewer `tokens`, and its mean.

    The part is weighted by how long a request runs; the mean is of new tokens,
    over all of them (those of others count 0).
    """
    weight = self.generated / self.generated.sum()
    short = self.generated < tokens
    part = float(weight[short].sum())
    return part, float((weight * self.generated)[short].sum())


@dataclasses.dataclass(frozen=True)
class Arrivals:
  """Single requests, in order of arrival."""

  arrival_s: np.ndarray  # [n]
  context: np.ndarray  # [n] tokens
  generated: np.ndarray  # [n] tokens, at least 1


@functools.cache
def _shipped() -> Mapping[str, Any]:
  found: dict[str, Any] = json.loads(STATISTICS.read_text("utf-8"))
  return found


def attribution() -> str:
  """Where the shipped statistics come from; goes beside what uses them."""
  return str(_shipped()["attribution"])


def statistics(name: str) -> Mapping[str, Any]:
  """The shipped statistics of a trace.

  Raises:
    ValueError: unknown name; names the choices.
  """
  traces = _shipped()["traces"]
  if name not in traces:
    raise ValueError(f"unknown trace {name!r}; choices: {', '.join(traces)}")
  found: Mapping[str, Any] = traces[name]
  return found


def minute_rates(
  of: Mapping[str, Any], minutes: int, rng: np.random.Generator
) -> np.ndarray:
  """Rates over their mean, [minutes], with a trace's spread and memory.

  Normal scores follow an autoregression of order one; each is given the rate
  of its quantile.
  """
  lag = float(of["minute_lag1"])
  noise = rng.standard_normal(minutes) * np.sqrt(1 - lag * lag)
  score = np.empty(minutes)
  last = rng.standard_normal()
  for i in range(minutes):
    last = lag * last + noise[i]
    score[i] = last
  rates = _inverse(of["minute_quantiles"], _normal_cdf(score))
  return rates / max(float(np.mean(_middles(of["minute_quantiles"]))), 1e-12)


def draw_lengths(
  of: Mapping[str, Any], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Prompt and new tokens of `n` requests, [n] int64 each; at least 1."""
  rho = float(of["rank_correlation"])
  normal = 2 * np.sin(rho * np.pi / 6)  # Pearson's, of normal scores
  first = rng.standard_normal(n)
  other = rng.standard_normal(n) * np.sqrt(1 - normal * normal)
  second = normal * first + other
  context = _inverse(of["context_quantiles"], _normal_cdf(first))
  generated = _inverse(of["generated_quantiles"], _normal_cdf(second))
  return _tokens(context), _tokens(generated)


def generate(
  of: Mapping[str, Any],
  seconds: float,
  rng: np.random.Generator,
  rate_per_s: float | None = None,
) -> Arrivals:
  """Requests of `seconds` seconds; by default as many as the trace has.

  Within a minute they come in bursts, of geometric size, whose seconds' counts
  have the trace's variance over mean.
  """
  minutes = int(np.ceil(seconds / MINUTE_S))
  mean = float(of["rate_per_s"]) if rate_per_s is None else rate_per_s
  if not mean > 0 or minutes < 1:
    raise ValueError(
      f"{mean} requests a second for {seconds} s; needed is more than 0 of both"
    )
  rates = minute_rates(of, minutes, rng) * mean
  size = (max(float(of["second_fano"]), 1.0) + 1) / 2  # of a burst, mean
  bursts = rng.poisson(rates * MINUTE_S / size)
  minute = np.repeat(np.arange(minutes), bursts)
  start = (minute + rng.uniform(0, 1, len(minute))) * MINUTE_S
  sizes = rng.geometric(1 / size, len(start))
  at = np.repeat(start, sizes)
  at = at + rng.uniform(0, 0.1, len(at)) * (size > 1)
  at = np.sort(at[at < seconds])
  context, generated = draw_lengths(of, len(at), rng)
  return Arrivals(at, context, generated)


def generated_load(
  name: str, minutes: int, rng: np.random.Generator
) -> Load:
  """The load of a shipped trace's statistics, drawn for `minutes` minutes."""
  of = statistics(name)
  context, generated = draw_lengths(of, _SAMPLES, rng)
  relative = minute_rates(of, minutes, rng)
  return Load(f"azure {name} (generated)", relative, context, generated)


def trace_load(
  name: str,
  arrival_s: np.ndarray,
  context: np.ndarray,
  generated: np.ndarray,
) -> Load:
  """The load of a real trace: its whole minutes, its lengths."""
  minutes = int(arrival_s[-1] // MINUTE_S) if len(arrival_s) else 0
  if minutes < 1:
    raise ValueError(f"trace {name!r} has no whole minute")
  minute = (arrival_s // MINUTE_S).astype(np.int64)
  counts = np.bincount(minute[minute < minutes], minlength=minutes)
  return Load(
    name,
    counts / counts.mean(),
    np.maximum(context, 1),
    np.maximum(generated, 1),
  )


def _tokens(values: np.ndarray) -> np.ndarray:
  return np.maximum(np.rint(values), 1).astype(np.int64)


def _inverse(pairs: list[list[float]], p: np.ndarray) -> np.ndarray:
  """Values at probabilities `p` [.], between (probability, value) pairs."""
  known, values = np.array(pairs).T
  return np.interp(p, known, values)


def _middles(pairs: list[list[float]]) -> np.ndarray:
  """The inverse at a fine grid: its mean is that of what is drawn."""
  return _inverse(pairs, (np.arange(1000) + 0.5) / 1000)


def _normal_cdf(x: np.ndarray) -> np.ndarray:
  """The normal distribution (Abramowitz and Stegun 26.2.17, 7.5e-8)."""
  t = 1 / (1 + 0.2316419 * np.abs(x))
  factors = (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530)
  poly = np.zeros_like(t)
  for factor in factors:
    poly = (poly + factor) * t
  tail = np.exp(-x * x / 2) / np.sqrt(2 * np.pi) * poly
  return np.where(x >= 0, 1 - tail, tail)
