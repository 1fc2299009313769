"""What every action's meaning is made of, and the loss of ranks."""

import dataclasses

import numpy as np
import numpy.typing as npt

from resilient_moe.recovery.checks import IllegalPlan
from resilient_moe.recovery.view import (
  ClusterView,
  Ranks,
  RoutingTable,
  Status,
)


def sealed(values: npt.ArrayLike, dtype: npt.DTypeLike) -> np.ndarray:
  """A fresh read-only copy."""
  array = np.array(values, dtype)
  array.setflags(write=False)
  return array


def known(view: ClusterView, ranks: Ranks) -> np.ndarray:
  """`ranks` as an array, [.] int32; an unknown one is an error."""
  array = np.asarray(ranks, np.int32).reshape(-1)
  n = len(view.status)
  bad = (array < 0) | (array >= n)
  if bad.any():
    raise IllegalPlan(f"unknown rank {array[bad][0]}; known: 0..{n - 1}")
  return array


def without(table: RoutingTable, gone: np.ndarray) -> RoutingTable:
  """The table less the entries in `gone`, [N] ranks or [N, S] slots, bool."""
  rank, slot = table.entries[:, :, 0], table.entries[:, :, 1]
  hit = gone[rank] if gone.ndim == 1 else gone[rank, slot]
  hit = hit & (rank >= 0)
  if not hit.any():
    return table
  entries = np.where(hit[:, :, None], -1, table.entries)
  # Live copies stay in front: -1 only pads.
  order = np.argsort(entries[:, :, 0] < 0, axis=1, kind="stable")
  packed = np.take_along_axis(entries, order[:, :, None], axis=1)
  return RoutingTable(sealed(packed, np.int32))


def lose(view: ClusterView, ranks: Ranks) -> ClusterView:
  """The view after `ranks` died, before anybody has recovered.

  Everything in their memory is gone: experts, KV, checkpoints they held for
  others. They stay in the mesh until a plan takes them out. Idempotent.
  """
  gone = np.zeros(len(view.status), bool)
  gone[known(view, ranks)] = True
  table = view.requests
  no_kv = (table.rank >= 0) & gone[table.rank]
  no_checkpoint = (table.checkpoint_rank >= 0) & gone[table.checkpoint_rank]
  requests = dataclasses.replace(
    table,
    kv_tokens=sealed(np.where(no_kv, 0, table.kv_tokens), np.int32),
    checkpoint_tokens=sealed(
      np.where(no_checkpoint, 0, table.checkpoint_tokens), np.int32
    ),
    checkpoint_rank=sealed(
      np.where(no_checkpoint, -1, table.checkpoint_rank), np.int32
    ),
  )
  return dataclasses.replace(
    view,
    status=sealed(np.where(gone, Status.LOST, view.status), np.int8),
    slots=sealed(np.where(gone[:, None], -1, view.slots), np.int32),
    table=without(view.table, gone),
    requests=requests,
  )
