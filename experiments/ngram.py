"""Interpolated Kneser-Ney over bytes: the baseline beside the trained model.

  p_c(w | h) = max(n_c(h, w) - d_c, 0) / N_c(h) + d_c T_c(h) / N_c(h) p_{c-1}

for contexts `h` of c bytes, with n_c the count of (h, w) at the highest order
and the number of different bytes seen before (h, w) below it, N_c its sum over
w, T_c the number of different w after h, and d_c = n1 / (n1 + 2 n2). p_{-1} is
uniform over 256 bytes, so every byte has a probability.

A context and its next byte are one uint64, so that tables are sorted arrays:
at most 7 bytes of context.
"""

import dataclasses

import numpy as np

MAX_CONTEXT = 7  # context and next byte fill the 8 bytes of a uint64


@dataclasses.dataclass(frozen=True)
class _Order:
  """Counts for one context length c."""

  pairs: np.ndarray  # [n] uint64 sorted, context bytes then the next byte
  counts: np.ndarray  # [n] float64 (continuation) counts of the pairs
  contexts: np.ndarray  # [m] uint64 sorted
  totals: np.ndarray  # [m] float64 sum of the counts after a context
  kinds: np.ndarray  # [m] float64 different bytes after a context
  discount: float


@dataclasses.dataclass(frozen=True)
class NGram:
  """A trained model; `orders[c]` conditions on c bytes."""

  orders: tuple[_Order, ...]

  @property
  def context(self) -> int:
    return len(self.orders) - 1

  def bits(self, stream: np.ndarray) -> np.ndarray:
    """Bits of each byte of a [n] uint8 stream, given those before it."""
    keys = [_windows(stream, c) for c in range(len(self.orders))]
    return -np.log2(self._interpolate(keys))

  def bits_per_byte(self, stream: np.ndarray) -> float:
    """Mean cross-entropy of a [n] uint8 stream."""
    return float(self.bits(stream).mean())

  def distribution(self, context: bytes) -> np.ndarray:
    """[256] probabilities of the next byte after `context`."""
    padded = b"\0" * self.context + context
    keys = []
    for c in range(len(self.orders)):
      head = int.from_bytes(padded[len(padded) - c :], "big") << 8
      keys.append(np.uint64(head) + np.arange(256, dtype=np.uint64))
    return self._interpolate(keys)

  def _interpolate(self, keys: list[np.ndarray]) -> np.ndarray:
    """Probabilities of pairs, given their keys at every context length."""
    p = np.full(keys[0].shape, 1.0 / 256)
    for order, pair in zip(self.orders, keys, strict=True):
      context = pair >> np.uint64(8)
      total = _lookup(order.contexts, order.totals, context)
      kinds = _lookup(order.contexts, order.kinds, context)
      count = _lookup(order.pairs, order.counts, pair)
      seen = total > 0
      safe = np.where(seen, total, 1.0)
      own = np.maximum(count - order.discount, 0.0) / safe
      p = np.where(seen, own + order.discount * kinds / safe * p, p)
    return p


def train(stream: np.ndarray, context: int) -> NGram:
  """Counts a [n] uint8 stream; `context` bytes at most are looked back at."""
  if not 0 <= context <= MAX_CONTEXT:
    raise ValueError(f"context={context}: must be 0 to {MAX_CONTEXT}")
  pairs, raw = np.unique(_windows(stream, context), return_counts=True)
  orders = [_order(pairs, raw.astype(np.float64))]
  for c in range(context - 1, -1, -1):
    # Each distinct longer pair counts once for the pair that is its suffix.
    mask = np.uint64((1 << 8 * (c + 1)) - 1)
    pairs, raw = np.unique(pairs & mask, return_counts=True)
    orders.append(_order(pairs, raw.astype(np.float64)))
  return NGram(tuple(reversed(orders)))


def best(stream: np.ndarray, held_out: np.ndarray) -> tuple[int, float]:
  """(context length, bits per byte) of the strongest order.

  The order is chosen on the held-out bytes themselves, which can only flatter
  the baseline.
  """
  scores = [
    (train(stream, c).bits_per_byte(held_out), c)
    for c in range(3, MAX_CONTEXT + 1)
  ]
  bits, context = min(scores)
  return context, bits


def _order(pairs: np.ndarray, counts: np.ndarray) -> _Order:
  contexts, starts = np.unique(pairs >> np.uint64(8), return_index=True)
  kinds = np.diff(np.append(starts, len(pairs))).astype(np.float64)
  once, twice = (counts == 1).sum(), (counts == 2).sum()
  # Without single counts (tiny text) nothing says how much to discount.
  discount = once / (once + 2 * twice) if once else 0.5
  return _Order(
    pairs,
    counts,
    contexts,
    np.add.reduceat(counts, starts),
    kinds,
    float(discount),
  )


def _windows(stream: np.ndarray, context: int) -> np.ndarray:
  """[n] uint64: each byte behind its `context` predecessors (0 before all)."""
  padded = np.concatenate([np.zeros(context, np.uint8), stream])
  keys = np.zeros(len(stream), np.uint64)
  for i in range(context + 1):
    keys = keys << np.uint64(8) | padded[i : i + len(stream)]
  return keys


def _lookup(
  table: np.ndarray, values: np.ndarray, keys: np.ndarray
) -> np.ndarray:
  """Values at sorted keys, 0 where a key is absent."""
  i = np.minimum(np.searchsorted(table, keys), len(table) - 1)
  return np.where(table[i] == keys, values[i], 0.0)
