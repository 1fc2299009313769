"""Sorting a layer's tokens by the expert rank (EW) that is to see them.

An *assignment* is one (token, choice) of the router; its flat index in N * k
is its name from here to the result. Pure functions, a few array operations
each whatever N: they run once a layer between attention and the experts.
"""

import itertools
from typing import NamedTuple, Protocol

import numpy as np

from resilient_moe.datapath.parcels import Parcel


class Lookup(Protocol):
  """What finds a live copy of each expert: `ExpertRoutes`, `LiveTable`."""

  def lookup(
    self, experts: np.ndarray, spread: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """(rank [n], slot [n]) of each expert; -1: it has no live copy."""


class Grouped(NamedTuple):
  """A layer's assignments, by EW."""

  parcels: dict[int, Parcel]  # EW -> what it is to see, ranks ascending
  where: dict[int, np.ndarray]  # EW -> [m] int64: its assignments, of N * k
  missing: list[int]  # experts without a live copy, sorted, each once
  left: np.ndarray  # [.] int64: the assignments that want those


def group(
  h: np.ndarray,
  experts: np.ndarray,
  live: np.ndarray,
  routes: Lookup,
  spread0: int,
  dedup: bool = True,
  *,
  layer: int = 0,
) -> Grouped:
  """Groups what the live tokens want, `experts` [N, k], by EW.

  Token t goes to copy number `spread0 + t` of an expert with several.
  `dedup` sends h [N, D] once to an EW that holds several of a token's experts;
  otherwise once an assignment, as the papers count traffic.
  """
  wanted = assignments(live, experts.shape[1])
  return group_some(h, experts, wanted, routes, spread0, dedup, layer=layer)


def assignments(live: np.ndarray, k: int) -> np.ndarray:
  """Flat indices of the live tokens' assignments, [.] int64 ascending."""
  return np.flatnonzero(np.repeat(live, k))


def group_some(
  h: np.ndarray,
  experts: np.ndarray,
  wanted: np.ndarray,
  routes: Lookup,
  spread0: int,
  dedup: bool = True,
  *,
  layer: int = 0,
) -> Grouped:
  """`group` of the assignments `wanted` only, flat indices, ascending."""
  if not wanted.size:
    return Grouped({}, {}, [], wanted)
  token = wanted // experts.shape[1]
  rank, slot = routes.lookup(experts.reshape(-1)[wanted], token + spread0)
  # Stable, so an EW's assignments stay in the order of their tokens.
  order = rank.argsort(kind="stable")
  rank, slot, where = rank[order], slot[order], wanted[order]
  edges = np.flatnonzero(rank[1:] != rank[:-1]) + 1
  bounds = [0, *edges.tolist(), len(order)]
  row, rows = _rows(h, token[order], dedup)
  left = wanted[:0]
  parcels, places = {}, {}
  for low, high in itertools.pairwise(bounds):
    to = int(rank[low])
    if to < 0:
      left = where[low:high]
      continue
    first, last = int(row[low]), int(row[high - 1])
    parcels[to] = Parcel(
      layer, rows[first : last + 1], row[low:high] - first, slot[low:high]
    )
    places[to] = where[low:high]
  missing = np.unique(experts.reshape(-1)[left]).tolist() if left.size else []
  return Grouped(parcels, places, missing, left)


def _rows(
  h: np.ndarray, token: np.ndarray, dedup: bool
) -> tuple[np.ndarray, np.ndarray]:
  """(row [n] int32 of each assignment, rows [., D]) of all parcels together.

  A token's assignments to one EW are adjacent, so a row is new where the token
  differs from the last one's. Two EWs may share a row where they meet.
  """
  fresh = np.ones(len(token), bool)
  if dedup:
    np.not_equal(token[1:], token[:-1], out=fresh[1:])
  row = fresh.cumsum(dtype=np.int32)
  row -= 1
  return row, h[token[fresh]]


def scatter(y_out: np.ndarray, where: np.ndarray, y: np.ndarray) -> None:
  """Puts results y [m, D] of the assignments `where` into y_out [N * k, D]."""
  y_out[where] = y


def traffic_bytes(parcel: Parcel) -> tuple[int, int]:
  """(sent, returned) bytes of embeddings of a parcel, without its indices."""
  rows = parcel.rows
  returned = len(parcel.slot) * rows.shape[1] * rows.itemsize
  return rows.nbytes, returned
