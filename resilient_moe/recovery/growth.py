"""After a recovery, behind traffic: growing back, and ready for the next."""

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.rescue import copies_from
from resilient_moe.recovery.view import (
  ClusterView,
  RoutingTable,
  Status,
  absent,
)


def grow(view: ClusterView) -> tuple[act.Action, ...]:
  """Brings every lost launched rank back.

  They are launched, receive an even share of the experts (read from those who
  serve now), join the mesh, and only then serve them. The old slots keep the
  weights as shadows.
  """
  away = (Status.LOST, Status.LAUNCHING)
  coming = [r for r in sorted(view.launched) if view.status[r] in away]
  lost = [r for r in coming if view.status[r] == Status.LOST]
  launch = tuple(act.LaunchRank(r) for r in lost)
  join = tuple(act.Rejoin(r) for r in coming)
  moves, table = _shares(view, coming)
  copies = copies_from(view, moves)
  if not moves or isinstance(copies, str):
    return launch + join
  return (*launch, *copies, *join, act.RemapExperts(table))


def _shares(
  view: ClusterView, coming: list[int]
) -> tuple[tuple[act.Move, ...], RoutingTable]:
  """Experts for the `coming` ranks, from who serves most, and the new table."""
  entries = view.table.entries.copy()
  served = np.bincount(
    entries[:, :, 0][entries[:, :, 0] >= 0], minlength=len(view.status)
  )
  even = int(served.sum()) // (len(view.mesh) + len(coming))
  moves: list[act.Move] = []
  for rank in coming:
    for slot in range(min(even, view.slots_per_rank)):
      donor = view.mesh[served[view.mesh].argmax()]
      hers = (entries[:, :, 0] == donor) & ~_on(entries, rank)[:, None]
      if not hers.any():
        break
      expert, copy = np.argwhere(hers)[-1]
      moves.append(act.Move(int(expert), rank, slot))
      entries[expert, copy] = rank, slot
      served[donor] -= 1
  entries.setflags(write=False)
  return tuple(moves), RoutingTable(entries)


def _on(entries: np.ndarray, rank: int) -> np.ndarray:
  """Experts that have a copy on `rank` already, [E] bool."""
  return (entries[:, :, 0] == rank).any(axis=1)


def next_meshes(view: ClusterView) -> tuple[act.Action, ...]:
  """Makes the meshes of the next single losses ready, unless they are."""
  mesh = view.mesh.tolist()
  names = [absent(view.launched, [m for m in mesh if m != r]) for r in mesh]
  wanted = [n for n in names if n not in view.ready and len(mesh) > 1]
  return tuple(act.FetchExecutable(name) for name in wanted)
