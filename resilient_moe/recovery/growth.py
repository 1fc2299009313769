"""After a recovery, behind traffic: growing back, and ready for the next."""

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import expert_ranks, servable
from resilient_moe.recovery.rescue import (
  assign,
  copies_from,
  lost_experts,
  retable,
)
from resilient_moe.recovery.semantics import advance, advance_all
from resilient_moe.recovery.view import (
  ClusterView,
  Role,
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


def back_to_attention(view: ClusterView) -> tuple[act.Action, ...]:
  """Ranks that had to take experts over attend again, if others can hold them.

  For a view in which replacements serve, but hold nothing yet.
  """
  actions: tuple[act.Action, ...] = ()
  switched = (view.home == Role.ATTENTION) & (view.role == Role.EXPERT)
  for rank in np.flatnonzero(switched & (view.status == Status.SERVING)):
    move = _emptying(view, int(rank))
    if not move:
      break
    actions += move
    view = advance_all(view, move)
  return actions


def _emptying(view: ClusterView, rank: int) -> tuple[act.Action, ...]:
  """The experts of `rank` into slots elsewhere, then its old role."""
  switch = act.SwitchRole(rank, Role.ATTENTION)
  without = advance(view, switch)
  moves = assign(without, lost_experts(without))
  copies = copies_from(view, moves) if not isinstance(moves, str) else moves
  if isinstance(moves, str) or isinstance(copies, str):
    return ()
  route = act.RemapExperts(retable(without, moves))
  actions = (*copies, route, switch)
  for action in actions:
    view = advance(view, action)
    if servable(view):  # a serving copy would have to make room
      return ()
  return actions


def _shares(
  view: ClusterView, coming: list[int]
) -> tuple[tuple[act.Move, ...], RoutingTable]:
  """Experts for the `coming` ranks, from who serves most, and the new table."""
  entries = view.table.entries.copy()
  served = np.bincount(
    entries[:, :, 0][entries[:, :, 0] >= 0], minlength=len(view.status)
  )
  coming = [r for r in coming if view.role[r] != Role.ATTENTION]
  holders = expert_ranks(view)
  even = int(served.sum()) // (len(holders) + len(coming) or 1)
  moves: list[act.Move] = []
  for rank in coming:
    for slot in range(min(even, view.slots_per_rank)):
      donor = holders[served[holders].argmax()]
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
  """Makes the meshes of the next single losses ready, unless they are.

  Where roles are apart no program belongs to a mesh.
  """
  if view.disaggregated:
    return ()
  mesh = view.mesh.tolist()
  names = [absent(view.launched, [m for m in mesh if m != r]) for r in mesh]
  wanted = [n for n in names if n not in view.ready and len(mesh) > 1]
  return tuple(act.FetchExecutable(name) for name in wanted)
