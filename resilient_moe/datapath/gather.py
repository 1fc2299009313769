"""When an EW starts a batch, and with whose tokens (EW-side healing).

An EW's batch is one layer of whatever AWs have sent by now. It is never a
barrier over all of them: an AW that is dead isn't waited for, its tokens are
left out. After Tarragon (arXiv 2601.01310).
"""

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np

from resilient_moe.datapath.parcels import Parcel


class Waiting(NamedTuple):
  """A parcel that has arrived at an EW and is in no batch yet."""

  aw: int  # who sent it
  ticket: int
  parcel: Parcel
  since_s: float  # when it arrived
  urgent: bool = False  # a replay, which has been held up once already


@dataclasses.dataclass(frozen=True)
class GatherLimits:
  """What a batch that some live AW is missing from waits for.

  By default it waits for nothing. With `min_rows` above 1 it can wait for
  ever, if too few rows come and a live AW has nothing to send: for AWs that
  are never idle.

  Attributes:
    min_rows: rows of its layer without which it doesn't start.
    wait_s: how long its oldest parcel waits for the other AWs.
  """

  min_rows: int = 1
  wait_s: float = 0.0

  def __post_init__(self) -> None:
    if self.min_rows < 1:
      raise ValueError(f"min_rows is {self.min_rows}; needed is at least 1")
    if not 0 <= self.wait_s < math.inf:
      raise ValueError(
        f"wait_s is {self.wait_s}; needed is a finite number of at least 0"
      )


def take(
  waiting: Sequence[Waiting],
  live_aws: Set[int],
  now_s: float,
  limits: GatherLimits,
) -> list[Waiting]:
  """The parcels of the next batch, replays first; [] to keep waiting.

  All of one layer: that of the oldest replay, otherwise of the oldest parcel.
  """
  batch = _candidates(waiting, live_aws)
  start_s = _start_s(batch, live_aws, limits)
  return batch if start_s is not None and start_s <= now_s else []


def next_deadline(
  waiting: Sequence[Waiting], live_aws: Set[int], limits: GatherLimits
) -> float | None:
  """When `take` gives a batch if nothing else arrives, maybe in the past.

  None: not before something arrives, or an AW is no longer live.
  """
  return _start_s(_candidates(waiting, live_aws), live_aws, limits)


def merge(
  parcels: Sequence[Parcel],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
  """One computation of several parcels of a layer, in their order.

  Returns:
    rows [n, D], token [m] into all rows, slot [m], and for `split` the
    positions in m between one parcel and the next.
  """
  if len(parcels) == 1:
    _, rows, token, slot = parcels[0]
    return rows, token, slot, []
  kinds = [(p.layer, p.rows.shape[1], p.rows.dtype) for p in parcels]
  if any(kind != kinds[0] for kind in kinds):
    raise ValueError(
      f"parcels of one batch differ in (layer, width, dtype): {set(kinds)}"
    )
  # Once a layer and EW, for a few rows: Python's sums are the fast ones.
  tokens, ends, first, assignments = [], [], 0, 0
  for p in parcels:
    tokens.append(p.token + np.int32(first))
    first += len(p.rows)
    assignments += len(p.token)
    ends.append(assignments)
  return (
    np.concatenate([p.rows for p in parcels]),
    np.concatenate(tokens),
    np.concatenate([p.slot for p in parcels]),
    ends[:-1],
  )


def split(y: np.ndarray, splits: Sequence[int]) -> list[np.ndarray]:
  """Each parcel's part of what was computed of their `merge`."""
  bounds = [0, *splits, len(y)]
  return [y[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _candidates(
  waiting: Sequence[Waiting], live_aws: Set[int]
) -> list[Waiting]:
  """The layer whose turn it is, replays first, each by age."""
  turn = sorted(
    (w for w in waiting if w.aw in live_aws),
    key=lambda w: (not w.urgent, w.since_s),
  )
  return [w for w in turn if w.parcel.layer == turn[0].parcel.layer]


def _start_s(
  batch: Sequence[Waiting], live_aws: Set[int], limits: GatherLimits
) -> float | None:
  if not batch:
    return None
  oldest_s = min(w.since_s for w in batch)
  if batch[0].urgent or live_aws <= {w.aw for w in batch}:
    return oldest_s
  rows = sum(len(w.parcel.rows) for w in batch)
  return oldest_s + limits.wait_s if rows >= limits.min_rows else None
