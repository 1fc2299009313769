"""What to do about a loss: which experts and requests go where.

Pure functions of a view whose mesh is already the one that serves next
(`advance` over RebuildMesh). Bounded work: passes over arrays, and Python
loops only over what was lost, so that a plan for 10,240 ranks takes
milliseconds.
"""

from collections.abc import Sequence

import numpy as np

from resilient_moe.recovery.actions import CopyExperts, Move
from resilient_moe.recovery.checks import expert_ranks, request_ranks
from resilient_moe.recovery.packing import deal, pack
from resilient_moe.recovery.placement import best_rank
from resilient_moe.recovery.view import ClusterView, RoutingTable, Tier


def held_copies(view: ClusterView) -> np.ndarray:
  """Copies of each expert in slots of the mesh, serving or not, [E]."""
  held = view.slots[expert_ranks(view)]
  return np.bincount(held[held >= 0], minlength=view.n_experts)


def lost_experts(view: ClusterView) -> np.ndarray:
  """Experts that no slot of the mesh holds, [.] int64."""
  return np.flatnonzero(held_copies(view) == 0)


def nearest_tier(view: ClusterView, expert: int) -> tuple[Tier, int] | None:
  """Where the weights of `expert` are nearest, and the peer (else -1)."""
  serving = view.table.entries[expert, :, 0]
  for rank in serving[serving >= 0].tolist():  # a shadow may be overwritten
    if view.alive()[rank] and expert in view.slots[rank]:
      return Tier.PEER, rank
  holders = np.flatnonzero((view.slots == expert).any(axis=1) & view.alive())
  if len(holders):
    return Tier.PEER, int(holders[0])
  if view.in_host_memory[expert]:
    return Tier.HOST, -1
  return (Tier.DISK, -1) if view.on_disk else None


def assign(
  view: ClusterView, experts: Sequence[int] | np.ndarray
) -> tuple[Move, ...] | str:
  """A slot of the mesh for each of `experts`, or the reason why not.

  Empty slots first, on the ranks that serve the fewest experts; then surplus
  copies of experts that stay covered are overwritten.
  """
  experts = np.asarray(experts, np.int64)
  ranks = expert_ranks(view)
  grid = view.slots[ranks]
  served = _served(view)[ranks]
  positions = deal(served, (grid < 0).sum(axis=1), len(experts))
  taken = np.zeros(len(ranks), np.int64)
  places: list[tuple[int, int]] = []
  for p in positions.tolist():
    places.append((p, int(np.flatnonzero(grid[p] < 0)[taken[p]])))
    taken[p] += 1
  missing = len(experts) - len(places)
  places += _surplus(view, grid, ranks, served, missing)
  if len(places) < len(experts):
    return (
      f"{len(experts)} experts need a slot, {len(places)} are free on "
      f"{len(ranks)} ranks of {view.slots_per_rank}"
    )
  return tuple(
    Move(int(e), int(ranks[p]), slot)
    for e, (p, slot) in zip(experts, places, strict=True)
  )


def _served(view: ClusterView) -> np.ndarray:
  """How many experts each rank serves, [N]."""
  rank = view.table.entries[:, :, 0]
  return np.bincount(rank[rank >= 0], minlength=len(view.status))


def _surplus(
  view: ClusterView,
  grid: np.ndarray,
  ranks: np.ndarray,
  served: np.ndarray,
  n: int,
) -> list[tuple[int, int]]:
  """Up to `n` (position, slot) whose expert has another copy in the mesh."""
  copies = held_copies(view)
  serves, used = serving_slots(view)[ranks], np.zeros(grid.shape, bool)
  taken = np.zeros(len(ranks), np.int64)
  places: list[tuple[int, int]] = []
  while len(places) < n and copies.max() > 1:
    spare = (grid >= 0) & ~used & (copies[grid] == copies.max())
    position, slot = np.nonzero(spare)
    # A shadow before a copy that serves; then ranks in turn, so that they
    # load side by side, the busiest first.
    order = (-served[position], taken[position], serves[position, slot])
    best = np.lexsort(order)[0]
    place = int(position[best]), int(slot[best])
    places.append(place)
    used[place] = True
    taken[place[0]] += 1
    copies[grid[place]] -= 1
  return places


def replicate(
  view: ClusterView, experts: np.ndarray, copies: int = 2
) -> tuple[Move, ...]:
  """Moves into empty slots until `experts` have `copies` in the mesh each.

  Spread over failure domains; what finds no empty slot is left out.
  """
  held, ranks = held_copies(view), expert_ranks(view)
  slots, moves = view.slots, list[Move]()
  for expert in np.asarray(experts)[held[experts] < copies].tolist():
    for _ in range(copies - int(held[expert])):
      rank = best_rank(view, slots, expert, ranks)
      if rank < 0:
        break
      slot = int((slots[rank] < 0).argmax())
      slots = slots.copy() if slots is view.slots else slots
      slots[rank, slot] = expert
      moves.append(Move(expert, rank, slot))
  return tuple(moves)


def serve_again(
  view: ClusterView, experts: np.ndarray, copies: int = 2
) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
  """What has `experts` served `copies` times each: moves, and promotions.

  As `replicate`, but a shadow doesn't count: it is promoted (no bytes move)
  where its rank is the best, and its slot is room for others. So growth, whose
  donors keep shadows, never uses the room up.
  """
  serves, ranks = serving_slots(view), expert_ranks(view)
  slots = np.where(serves, view.slots, -1)
  served, wanted = view.table.copies(), np.asarray(experts)
  moves, promoted = list[Move](), list[Move]()
  for expert in wanted[served[wanted] < copies].tolist():
    for _ in range(copies - int(served[expert])):
      rank = best_rank(view, slots, expert, ranks)
      if rank < 0:
        break
      held, free = view.slots[rank], slots[rank] < 0
      shadows = np.flatnonzero(free & (held == expert))
      empty = np.flatnonzero(free & (held < 0))
      choice = next(c for c in (shadows, empty, np.flatnonzero(free)) if len(c))
      slot = int(choice[0])
      slots[rank, slot] = expert
      (promoted if len(shadows) else moves).append(Move(expert, rank, slot))
  return tuple(moves), tuple(promoted)


def serving_slots(view: ClusterView) -> np.ndarray:
  """Slots that the table routes to, [N, S] bool."""
  entries = view.table.entries.reshape(-1, 2)
  entries = entries[entries[:, 0] >= 0]
  serves = np.zeros(view.slots.shape, bool)
  serves[entries[:, 0], entries[:, 1]] = True
  return serves


def copies_from(
  view: ClusterView, moves: tuple[Move, ...]
) -> tuple[CopyExperts, ...] | str:
  """The copy actions for `moves`, one a tier, nearest first; or why not."""
  by_tier: dict[Tier, list[Move]] = {}
  for move in moves:
    found = nearest_tier(view, move.expert)
    if found is None:
      return f"the weights of expert {move.expert} are nowhere to be read"
    tier, source = found
    by_tier.setdefault(tier, []).append(
      Move(move.expert, move.rank, move.slot, source)
    )
  return tuple(
    CopyExperts(tuple(by_tier[tier]), tier) for tier in Tier if tier in by_tier
  )


def retable(
  view: ClusterView, moves: tuple[Move, ...] = ()
) -> RoutingTable:
  """The table with `moves` serving, and held experts that nobody serves.

  What serves goes on as it is, shadows are promoted only where they are
  needed.
  """
  entries = view.table.entries
  member = np.zeros(len(view.status), bool)
  member[expert_ranks(view)] = True
  keep = (entries[:, :, 0] >= 0) & member[entries[:, :, 0]]
  for move in moves:  # the copy overwrites what served there
    at = (entries[:, :, 0] == move.rank) & (entries[:, :, 1] == move.slot)
    keep &= ~at
  expert, copy = np.nonzero(keep)
  rank, slot = entries[expert, copy, 0], entries[expert, copy, 1]
  filled = [(m.expert, m.rank, m.slot) for m in moves]
  added = np.array(filled, np.int64).reshape(-1, 3)
  idle = ~np.isin(np.arange(view.n_experts), np.append(expert, added[:, 0]))
  at, place = np.nonzero((view.slots >= 0) & member[:, None])
  promoted = idle[view.slots[at, place]]
  for move in moves:
    promoted &= ~((at == move.rank) & (place == move.slot))
  at, place = at[promoted], place[promoted]
  experts = np.concatenate([expert, view.slots[at, place], added[:, 0]])
  ranks = np.concatenate([rank, at, added[:, 1]])
  places = np.concatenate([slot, place, added[:, 2]])
  shape = (view.n_experts, entries.shape[1])
  return pack(experts, ranks, places, shape)


def spread_requests(view: ClusterView, index: np.ndarray) -> np.ndarray:
  """A rank for each of the requests `index`, by free rows; -1: no row, [.].

  They don't count where they sit now. The emptiest ranks come first.
  """
  index = np.asarray(index, np.int64)
  stay = np.ones(len(view.requests.rank), bool)
  stay[index] = False
  stay &= view.requests.rank >= 0
  ranks = request_ranks(view)
  rows = np.bincount(view.requests.rank[stay], minlength=len(view.status))
  held = rows[ranks]
  room = np.maximum(view.rows_per_rank - held, 0)
  to = np.full(len(index), -1, np.int64)
  dealt = ranks[deal(held, room, len(index))]
  to[: len(dealt)] = dealt
  return to
