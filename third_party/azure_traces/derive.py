"""What the traces have in common with each other, in a few hundred numbers.

  python -m third_party.azure_traces DIR > FILE

writes the statistics of the published files in DIR as JSON: the file that
ships as `resilient_moe/assets/azure_statistics.json`. They are derived data;
the traces themselves are not shipped.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from third_party.azure_traces.reader import Record

MINUTE_S = 60
# Every percent of requests, and more of the longest.
TOKEN_P = (*(i / 100 for i in range(100)), 0.995, 0.999, 1.0)
MINUTE_P = tuple(i / 20 for i in range(21))

ATTRIBUTION = (
  "Statistics derived from the Azure Public Dataset (Microsoft, CC-BY 4.0; "
  "github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023). Cite: "
  "Patel et al., Splitwise: Efficient generative LLM inference using phase "
  "splitting, ISCA 2024."
)


def statistics(records: Sequence[Record]) -> dict[str, Any]:
  """Rate, burstiness and lengths of a trace; whole minutes only.

  Keys: `requests`, `rate_per_s`; `minute_quantiles`, of requests a minute
  over their mean, and `minute_lag1`, the correlation of neighbours (of normal
  scores); `second_fano`, variance over mean of requests a second, within a
  minute; `context_quantiles`, `generated_quantiles`, in tokens, and
  `rank_correlation` of the two; means of both.

  Raises:
    ValueError: fewer than three whole minutes.
  """
  at = np.array([r.arrival_s for r in records])
  minutes = int(at[-1] // MINUTE_S) if len(at) else 0
  if minutes < 3:
    raise ValueError(f"{minutes} whole minutes of a trace; needed are 3")
  inside = at < minutes * MINUTE_S
  seconds = np.bincount(at[inside].astype(int), minlength=minutes * MINUTE_S)
  by_minute = seconds.reshape(minutes, MINUTE_S)
  counts = by_minute.sum(axis=1)
  busy = by_minute[counts > 0]
  score = np.argsort(np.argsort(counts, kind="stable"), kind="stable")
  normal = _normal((score + 0.5) / minutes)
  context = np.array([r.context_tokens for r in records])
  generated = np.array([r.generated_tokens for r in records])
  fano = busy.var(axis=1) / busy.mean(axis=1)
  return {
    "requests": len(records),
    "minutes": minutes,
    "rate_per_s": _short(counts.mean() / MINUTE_S),
    "minute_quantiles": _quantiles(counts / counts.mean(), MINUTE_P),
    "minute_lag1": _short(np.corrcoef(normal[:-1], normal[1:])[0, 1]),
    "second_fano": _short(np.average(fano, weights=busy.sum(axis=1))),
    "context_mean": _short(context.mean()),
    "generated_mean": _short(generated.mean()),
    "context_quantiles": _quantiles(context, TOKEN_P),
    "generated_quantiles": _quantiles(generated, TOKEN_P),
    "rank_correlation": _short(_rank_correlation(context, generated)),
  }


def _short(value: float) -> float:
  """Six digits: what a trace of an hour can say."""
  return float(f"{value:.6g}")


def _quantiles(
  values: np.ndarray, probabilities: Sequence[float]
) -> list[list[float]]:
  """(probability, value) pairs."""
  found = np.quantile(values, probabilities)
  pairs = zip(probabilities, found, strict=True)
  return [[p, _short(value)] for p, value in pairs]


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Spearman's, ties in order."""
  first, second = (np.argsort(np.argsort(x, kind="stable")) for x in (a, b))
  return float(np.corrcoef(first, second)[0, 1])


def _normal(p: np.ndarray) -> np.ndarray:
  """Quantiles of the normal distribution, by bisection on `erf`."""
  low, high = np.full(p.shape, -8.0), np.full(p.shape, 8.0)
  for _ in range(50):
    middle = (low + high) / 2
    below = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in middle]
    left = np.array(below) < p
    low, high = np.where(left, middle, low), np.where(left, high, middle)
  return (low + high) / 2
