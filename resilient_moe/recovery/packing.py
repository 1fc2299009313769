"""Dealing items to the emptiest, and packing places into a routing table."""

import numpy as np

from resilient_moe.recovery.view import RoutingTable


def slots_needed(copies: int, ranks: int) -> int:
  """Slots a rank so that `copies` expert copies fit on `ranks` ranks."""
  return -(-copies // ranks)


def deal(held: np.ndarray, room: np.ndarray, n: int) -> np.ndarray:
  """Positions [<= n] that take one item each, the emptiest first.

  `held` [R] is what each position has, `room` [R] how many more it takes.
  Same as picking the position with the fewest items n times (the first of
  equals), but without n passes; shorter than n when the room is used up.
  """
  n = min(n, int(room.sum()))
  if n == 0:
    return np.zeros(0, np.int64)
  low, high = 0, int((held + room).max())
  while low < high:  # the lowest level that takes n items
    level = (low + high) // 2
    if np.clip(level - held, 0, room).sum() >= n:
      high = level
    else:
      low = level + 1
  below = np.clip(low - 1 - held, 0, room)
  top = np.flatnonzero(np.clip(low - held, 0, room) > below)
  top = top[: n - int(below.sum())]
  position = np.repeat(np.arange(len(held)), below)
  first = np.repeat(np.cumsum(below) - below, below)
  height = held[position] + np.arange(len(position)) - first
  order = np.lexsort((position, height))
  return np.concatenate([position[order], top])


def pack(
  expert: np.ndarray,
  rank: np.ndarray,
  slot: np.ndarray,
  shape: tuple[int, int],
) -> RoutingTable:
  """A table of `shape` (E, C) from places [.]; the first C copies count."""
  n_experts, copies = shape
  order = np.argsort(expert, kind="stable")
  expert, rank, slot = expert[order], rank[order], slot[order]
  copy = np.arange(len(expert)) - np.searchsorted(expert, expert)
  keep = copy < copies
  entries = np.full((n_experts, copies, 2), -1, np.int32)
  entries[expert[keep], copy[keep], 0] = rank[keep]
  entries[expert[keep], copy[keep], 1] = slot[keep]
  entries.setflags(write=False)
  return RoutingTable(entries)


def routing_table(
  slots: np.ndarray, ranks: np.ndarray, n_experts: int, copies: int
) -> RoutingTable:
  """All that `ranks` hold serves, up to `copies` each, in mesh order."""
  grid = slots[ranks]
  position, slot = np.nonzero(grid >= 0)
  return pack(
    grid[position, slot], ranks[position], slot, (n_experts, copies)
  )
