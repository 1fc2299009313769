"""After a recovery, behind traffic: growing back, and ready for the next."""

from collections.abc import Callable

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import expert_ranks, servable
from resilient_moe.recovery.rescue import (
  assign,
  copies_from,
  lost_experts,
  retable,
)
from resilient_moe.recovery.semantics import advance, advance_all, lose
from resilient_moe.recovery.view import (
  ClusterView,
  Role,
  RoutingTable,
  Status,
  absent,
)

Actions = tuple[act.Action, ...]


def regrow(
  view: ClusterView, refill: Callable[[ClusterView], Actions]
) -> Actions:
  """Lost ranks come back, switched roles too, then what had no room till now.

  `refill` says what is to be copied into slots of the grown instance. Copies
  run before anybody joins, so none of them may read from who is coming.
  """
  coming = _coming(view)
  actions = grow(view)
  grown = advance_all(view, actions)
  back = back_to_attention(grown, view)
  actions, grown = actions + back, advance_all(grown, back)
  if not coming and not back:
    return actions  # `refill` was asked already
  return actions + _reread(lose(grown, coming), refill(grown))


def _reread(readable: ClusterView, actions: Actions) -> Actions:
  """`actions`, whose copies come from where `readable` has them instead."""
  copies = [a for a in actions if isinstance(a, act.CopyExperts)]
  moves = tuple(move for action in copies for move in action.moves)
  again = copies_from(readable, moves)
  if isinstance(again, str):
    return ()
  others = (a for a in actions if not isinstance(a, act.CopyExperts))
  return again + tuple(others)


def _coming(view: ClusterView) -> list[int]:
  """Launched ranks that are away, ascending."""
  away = np.isin(view.status, (Status.LOST, Status.LAUNCHING))
  launched = np.array(view.launched, np.int64)
  return np.sort(launched[away[launched]]).tolist()


def grow(view: ClusterView) -> Actions:
  """Brings every lost launched rank back, in the role it was started in.

  They are launched, receive an even share of the experts (read from those who
  serve now), join the mesh, and only then serve them. The old slots keep the
  weights as shadows.
  """
  coming = _coming(view)
  lost = [r for r in coming if view.status[r] == Status.LOST]
  launch = tuple(act.LaunchRank(r) for r in lost)
  join = tuple(act.Rejoin(r) for r in coming)
  moves, table = _shares(view, coming)
  copies = copies_from(view, moves)
  if not moves or isinstance(copies, str):
    return launch + join
  return (*launch, *copies, *join, act.RemapExperts(table))


def _switched(view: ClusterView) -> np.ndarray:
  """Ranks that left attention to hold experts, [N] bool."""
  return (view.home == Role.ATTENTION) & (view.role == Role.EXPERT)


def back_to_attention(view: ClusterView, before: ClusterView) -> Actions:
  """Ranks that had to take experts over attend again, if others can hold them.

  For a view in which replacements serve. `before` they came: copies run then,
  so they write to no slot that serves there.
  """
  actions: Actions = ()
  switched = np.flatnonzero(_switched(view) & (view.status == Status.SERVING))
  for rank in switched.tolist():
    move = _emptying(view, rank, before)
    if not move:
      break
    actions += move
    view = advance_all(view, move)
  return actions


def _emptying(
  view: ClusterView, rank: int, before: ClusterView
) -> Actions:
  """The experts of `rank` into slots elsewhere, then its old role."""
  switch = act.SwitchRole(rank, Role.ATTENTION)
  without = advance(view, switch)
  moves = assign(without, lost_experts(without))
  if isinstance(moves, str) or _served_slots(before, moves):
    return ()
  copies = copies_from(view, moves)  # from `rank`: nobody else has them
  if isinstance(copies, str):
    return ()
  table = retable(without, moves)
  same = np.array_equal(table.entries, view.table.entries)
  route: Actions = () if same else (act.RemapExperts(table),)
  actions = (*copies, *route, switch)
  for action in actions:
    view = advance(view, action)
    if servable(view):  # a serving copy would have to make room
      return ()
  return actions


def _served_slots(view: ClusterView, moves: tuple[act.Move, ...]) -> bool:
  """Whether any of `moves` would overwrite a slot that serves."""
  entries = view.table.entries
  at = entries[:, :, 0] * view.slots_per_rank + entries[:, :, 1]
  serves = at[entries[:, :, 0] >= 0]
  to = [m.rank * view.slots_per_rank + m.slot for m in moves]
  return bool(np.isin(to, serves).any())


def _shares(
  view: ClusterView, coming: list[int]
) -> tuple[tuple[act.Move, ...], RoutingTable]:
  """Experts for the `coming` ranks, from who serves most, and the new table.

  Ranks that switched to experts give theirs first, as many as there is room.
  """
  entries = view.table.entries.copy()
  served = np.bincount(
    entries[:, :, 0][entries[:, :, 0] >= 0], minlength=len(view.status)
  )
  coming = [r for r in coming if view.home[r] != Role.ATTENTION]
  holders, switched = expert_ranks(view), _switched(view)
  stay = int((~switched[holders]).sum()) + len(coming)
  even = int(served.sum()) // (stay or 1)
  moves: list[act.Move] = []
  for slot in range(view.slots_per_rank):
    for rank in coming:
      early = switched[holders] & (served[holders] > 0)
      if slot >= even and not early.any():
        break
      order = served[holders] + early * (served.sum() + 1)
      donor = holders[order.argmax()]
      hers = (entries[:, :, 0] == donor) & ~_on(entries, rank)[:, None]
      if not hers.any():
        continue
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
