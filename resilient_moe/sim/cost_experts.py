"""Which ranks the tokens of a step go to, and how many experts they touch."""

from typing import NamedTuple

import numpy as np

from resilient_moe.recovery.view import ClusterView


def zipf(n: int, exponent: float = 0.0) -> np.ndarray:
  """Popularity of `n` experts, [n], sums to 1; 0: all alike."""
  weight = np.arange(1, n + 1, dtype=float) ** -exponent
  return weight / weight.sum()


def pick_rate(
  load: np.ndarray, top_k: int, masked: np.ndarray | None = None
) -> np.ndarray:
  """Chance that a token picks each expert, [E]; sums to `top_k`.

  Proportional to `load` [E] (tokens an expert gets, any unit), at most 1:
  what a saturated expert can't take, the others do. Masked ones get nothing.

  Raises:
    ValueError: fewer experts are left than a token needs.
  """
  weight = np.asarray(load, float).copy()
  if masked is not None:
    weight[masked] = 0.0
  live = int((weight > 0).sum())
  if live < top_k:
    raise ValueError(f"{live} experts can be picked; a token needs {top_k}")
  full = np.zeros(len(weight), bool)
  while True:
    rest = np.where(full, 0.0, weight)
    left = top_k - int(full.sum())
    rate = np.where(full, 1.0, left * rest / max(rest.sum(), 1e-300))
    over = (rate > 1.0) & ~full
    if not over.any():
      return rate
    full |= over


class ExpertLoad(NamedTuple):
  """What a step's tokens ask of the ranks that hold experts, one layer."""

  ranks: np.ndarray  # [M] int64 who serves experts
  pairs: np.ndarray  # [M] expected (token, expert) pairs
  touched: np.ndarray  # [M] expected distinct experts with any token


def expert_load(
  view: ClusterView, rate: np.ndarray, tokens: float
) -> ExpertLoad:
  """Expected load of `tokens` tokens routed by the view's table.

  Copies of an expert share its tokens evenly. A copy is touched with
  probability `1 - (1 - rate / copies) ** tokens`: tokens choose
  independently.
  """
  entries = view.table.entries
  rank = entries[:, :, 0]
  used = rank >= 0
  copies = used.sum(axis=1)
  share = np.where(copies > 0, rate / np.maximum(copies, 1), 0.0)
  with np.errstate(divide="ignore"):
    missed = np.exp(tokens * np.log1p(-np.minimum(share, 1.0)))
  touched = 1.0 - np.where(tokens > 0, missed, 1.0)
  expert = np.broadcast_to(np.arange(len(copies))[:, None], rank.shape)[used]
  at = rank[used]
  n = len(view.status)
  pairs = np.bincount(at, tokens * share[expert], n)
  distinct = np.bincount(at, touched[expert], n)
  ranks = np.flatnonzero(np.bincount(at, minlength=n))
  return ExpertLoad(ranks, pairs[ranks], distinct[ranks])
