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
  serving_slots,
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
  actions = grow(view, refill)
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


def grow(
  view: ClusterView, refill: Callable[[ClusterView], Actions]
) -> Actions:
  """Brings every lost launched rank back, in the role it was started in.

  They are launched, receive what `refill` would serve from them and then an
  even share of the experts (read from those who serve now), join the mesh, and
  only then serve. The old slots keep the weights as shadows.
  """
  coming = _coming(view)
  lost = [r for r in coming if view.status[r] == Status.LOST]
  launch = tuple(act.LaunchRank(r) for r in lost)
  join = tuple(act.Rejoin(r) for r in coming)
  if not coming:
    return ()
  filled, added = _refilled(advance_all(view, launch + join), refill)
  moves, table = _shares(view, filled, coming)
  copies = copies_from(view, added + moves)
  same = np.array_equal(table.entries, view.table.entries)
  if isinstance(copies, str) or same:
    return launch + join
  return (*launch, *copies, *join, act.RemapExperts(table))


def _refilled(
  joined: ClusterView, refill: Callable[[ClusterView], Actions]
) -> tuple[ClusterView, tuple[act.Move, ...]]:
  """`joined` with what `refill` serves from it, and the moves of that.

  Copies that are not to serve come later: a donor's old slot may do for them.
  """
  actions = refill(joined)
  if not any(isinstance(action, act.RemapExperts) for action in actions):
    return joined, ()
  copies = (a for a in actions if isinstance(a, act.CopyExperts))
  moves = tuple(move for action in copies for move in action.moves)
  return advance_all(joined, actions), moves


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
  view: ClusterView, filled: ClusterView, coming: list[int]
) -> tuple[tuple[act.Move, ...], RoutingTable]:
  """Experts for the `coming` ranks, from who serves most, and the new table.

  `filled` is `view` with them in its mesh and what they serve already. Ranks
  that switched to experts give theirs first, as many as there is room.
  """
  entries = filled.table.entries.copy()
  served = np.bincount(
    entries[:, :, 0][entries[:, :, 0] >= 0], minlength=len(view.status)
  )
  first = _switched(view) * (served.sum() + 1)
  holders = [r for r in coming if view.home[r] != Role.ATTENTION]
  room = {rank: _room(filled, rank) for rank in holders}
  moves: list[act.Move] = []
  while room:
    rank = min(room, key=lambda r: int(served[r]))
    wishes = np.where(served > 0, served + first, 0)
    found = _gift(view, entries, wishes, rank) if room[rank] else None
    if found is None:
      del room[rank]
      continue
    expert, copy = found
    served[entries[expert, copy, 0]] -= 1
    served[rank] += 1
    entries[expert, copy] = rank, room[rank].pop(0)
    moves.append(act.Move(expert, rank, int(entries[expert, copy, 1])))
  entries.setflags(write=False)
  return tuple(moves), RoutingTable(entries)


def _room(view: ClusterView, rank: int) -> list[int]:
  """Slots of a rank that don't serve, the empty ones first."""
  free = np.flatnonzero(~serving_slots(view)[rank])
  shadow = view.slots[rank, free] >= 0
  return free[np.argsort(shadow, kind="stable")].tolist()


def _gift(
  view: ClusterView, entries: np.ndarray, wishes: np.ndarray, rank: int
) -> tuple[int, int] | None:
  """The (expert, copy) that `rank` takes over next; None: it has its share.

  From who in the mesh of `view` has the largest of `wishes` [N] to give: one
  whose other copies are on other hosts than `rank`, if there is any.
  """
  on = entries[:, :, 0]
  mine = (on == rank).any(axis=1, keepdims=True)
  near = (on >= 0) & (view.host[on] == view.host[rank])
  beside = near.sum(axis=1, keepdims=True) > near
  donors = expert_ranks(view)
  left, second = wishes[donors], None
  while len(left) and left.max() > wishes[rank] + 1:
    at = int(left.argmax())
    hers = (on == donors[at]) & ~mine
    apart = hers & ~beside
    if apart.any():
      expert, copy = np.argwhere(apart)[-1]
      return int(expert), int(copy)
    if second is None and hers.any():
      second = np.argwhere(hers)[-1]
    left[at] = 0
  return None if second is None else (int(second[0]), int(second[1]))


def next_meshes(
  view: ClusterView, spares: bool = False
) -> tuple[act.Action, ...]:
  """Makes the meshes of the next single losses ready, unless they are.

  `spares`: the first spare that stands by takes the place of who is lost.
  Where roles are apart no program belongs to a mesh.
  """
  if view.disaggregated:
    return ()
  mesh = view.mesh.tolist()
  stand_by = np.flatnonzero(view.status == Status.SPARE).tolist()
  joins = stand_by[:1] if spares else []
  names = [
    absent(view.launched, [*(m for m in mesh if m != r), *joins]) for r in mesh
  ]
  wanted = [n for n in names if n not in view.ready and len(mesh) > 1]
  return tuple(act.FetchExecutable(name) for name in wanted)
