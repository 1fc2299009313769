"""From a view to what attention ranks are told of it."""

from collections.abc import Mapping

import numpy as np

from resilient_moe.datapath.routes import Routes
from resilient_moe.recovery.checks import expert_ranks
from resilient_moe.recovery.view import ClusterView


def routes_of(
  view: ClusterView, version: int, incarnations: Mapping[int, int]
) -> Routes:
  """Who serves each expert, and who holds it as a shadow.

  `version` counts pushes: the table changes more often than the membership.
  In the place of a slot stands the expert: its rank knows where it keeps it.
  """
  entries = view.table.entries
  members = expert_ranks(view)
  alive = members[view.alive()[members]]
  serving = np.where(
    np.isin(entries[:, :, :1], alive), entries, -1
  ).astype(np.int32)
  standby = _shadows(view, serving, alive)
  known = {int(r): incarnations.get(int(r), 0) for r in alive}
  return Routes(
    version, _by_name(serving), _by_name(standby), known, view.masked.copy()
  )


def _by_name(entries: np.ndarray) -> np.ndarray:
  """(rank, expert) for (rank, slot)."""
  named = entries.copy()
  named[:, :, 1] = np.arange(len(entries), dtype=np.int32)[:, None]
  named[entries[:, :, 0] < 0] = -1
  return named


def _shadows(
  view: ClusterView, serving: np.ndarray, alive: np.ndarray
) -> np.ndarray:
  """Held copies that don't serve, [E, C, 2]; masked experts have none."""
  serves = np.zeros(view.slots.shape, bool)
  used = serving[serving[:, :, 0] >= 0]
  serves[used[:, 0], used[:, 1]] = True
  idle = (view.slots >= 0) & ~serves
  idle &= np.isin(np.arange(len(view.status)), alive)[:, None]
  rank, slot = np.nonzero(idle)
  expert = view.slots[rank, slot]
  keep = ~view.masked[expert]
  rank, slot, expert = rank[keep], slot[keep], expert[keep]
  order = np.argsort(expert, kind="stable")
  rank, slot, expert = rank[order], slot[order], expert[order]
  copy = np.arange(len(expert)) - np.searchsorted(expert, expert)
  width = int(copy.max(initial=-1)) + 1
  standby = np.full((view.n_experts, max(width, 1), 2), -1, np.int32)
  standby[expert, copy, 0], standby[expert, copy, 1] = rank, slot
  return standby
