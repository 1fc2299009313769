"""Two predicates on views: can it be planned from, can it be served from.

Both answer None for yes, else one sentence with the value and the limit. Every
action leaves a view that can be planned from (a failure may replace the plan
after any of them); the end of a plan's `resume`, and everything after it, can
be served from (invariant 5).
"""

import numpy as np

from resilient_moe.recovery.view import (
  ClusterView,
  Ranks,
  Role,
  Status,
  absent,
  mesh_named,
)


class IllegalPlan(ValueError):
  """A plan that must not be executed: what is wrong, the value, the limit."""


def expert_ranks(view: ClusterView) -> np.ndarray:
  """Members of the mesh that may hold serving experts, mesh order, [.]."""
  return view.mesh[view.role[view.mesh] != Role.ATTENTION]


def request_ranks(view: ClusterView) -> np.ndarray:
  """Members of the mesh that may hold requests, mesh order, [.]."""
  return view.mesh[view.role[view.mesh] != Role.EXPERT]


def uncovered(view: ClusterView) -> np.ndarray:
  """Experts that nobody serves though no mask hides them, [.] int64."""
  return np.flatnonzero(~view.masked & (view.table.copies() == 0))


def plannable(view: ClusterView) -> str | None:
  """Why no plan can start from this view; None if one can."""
  return _mesh_fault(view) or _slots_fault(view) or _requests_fault(view)


def servable(view: ClusterView) -> str | None:
  """Why traffic can't be served from this view; None if it can."""
  return (
    plannable(view)
    or _members_fault(view)
    or _coverage_fault(view)
    or _rows_fault(view)
  )


def _mesh_fault(view: ClusterView) -> str | None:
  n = len(view.status)
  outside = view.mesh[(view.mesh < 0) | (view.mesh >= n)]
  if len(outside):
    return f"rank {outside[0]} in the mesh is outside 0..{n - 1}"
  if len(view.mesh) and np.bincount(view.mesh).max() > 1:
    return f"rank {np.bincount(view.mesh).argmax()} is twice in the mesh"
  return None


def _slots_fault(view: ClusterView) -> str | None:
  held = view.slots[view.status == Status.LOST]
  if (held >= 0).any():
    return f"a lost rank still holds expert {held[held >= 0][0]}"
  if view.slots.size and view.slots.max() >= view.n_experts:
    return f"expert {view.slots.max()} is outside 0..{view.n_experts - 1}"
  return table_fault(view, view.table.entries)


def table_fault(view: ClusterView, entries: np.ndarray) -> str | None:
  """Why `entries` [E, C, 2] can't be a routing table here, else None."""
  experts = view.n_experts
  if entries.ndim != 3 or entries.shape[0] != experts or entries.shape[2] != 2:
    return f"table of shape {entries.shape}, not [{experts}, C, 2]"
  used = entries[:, :, 0] >= 0
  if (used[:, 1:] & ~used[:, :-1]).any():
    gap = int((used[:, 1:] & ~used[:, :-1]).any(axis=1).argmax())
    return f"the table pads expert {gap} before its last copy, not after"
  expert, copy = np.nonzero(used)
  rank, slot = entries[expert, copy, 0], entries[expert, copy, 1]
  n, per_rank = view.slots.shape
  bad = (rank >= n) | (slot < 0) | (slot >= per_rank)
  if bad.any():
    i = bad.argmax()
    return (
      f"expert {expert[i]} is routed to rank {rank[i]} slot {slot[i]}, "
      f"outside {n} ranks of {per_rank} slots"
    )
  return _entries_fault(view, expert, rank, slot)


def _entries_fault(
  view: ClusterView, expert: np.ndarray, rank: np.ndarray, slot: np.ndarray
) -> str | None:
  """The same for entries (all [.]) that are known to be in range."""
  member = np.zeros(len(view.status), bool)
  member[view.mesh] = True
  dead = ~member[rank] | (view.status[rank] != Status.SERVING)
  if dead.any():
    i = dead.argmax()
    status = Status(view.status[rank[i]]).name
    return (
      f"expert {expert[i]} is routed to rank {rank[i]}, "
      f"which is {status} and {'in' if member[rank[i]] else 'not in'} the mesh"
    )
  wrong = view.slots[rank, slot] != expert
  if wrong.any():
    i = wrong.argmax()
    held = view.slots[rank[i], slot[i]]
    return (
      f"expert {expert[i]} is routed to rank {rank[i]} slot {slot[i]}, "
      f"which {'is empty' if held < 0 else f'holds expert {held}'}"
    )
  places = rank.astype(np.int64) * view.slots_per_rank + slot
  if len(places) and np.bincount(places).max() > 1:
    return f"expert {expert[0]} or another is routed to one slot twice"
  return None


def _requests_fault(view: ClusterView) -> str | None:
  table, n = view.requests, len(view.status)
  bad = (table.rank < -1) | (table.rank >= n)
  if bad.any():
    i = bad.argmax()
    return f"request {table.request_id[i]} sits on unknown rank {table.rank[i]}"
  lost = view.status == Status.LOST
  ghost = (table.rank >= 0) & lost[table.rank] & (table.kv_tokens > 0)
  if ghost.any():
    i = ghost.argmax()
    return f"request {table.request_id[i]} has KV on lost rank {table.rank[i]}"
  ghost = (table.checkpoint_rank >= 0) & lost[table.checkpoint_rank]
  if ghost.any():
    i = ghost.argmax()
    holder = table.checkpoint_rank[i]
    return f"request {table.request_id[i]} has its checkpoint on lost {holder}"
  return None


def _members_fault(view: ClusterView) -> str | None:
  if not len(view.mesh):
    return "the mesh has 0 ranks; at least 1 must serve"
  status = view.status[view.mesh]
  if (status != Status.SERVING).any():
    i = (status != Status.SERVING).argmax()
    return f"rank {view.mesh[i]} in the mesh is {Status(status[i]).name}"
  name = absent(view.launched, view.mesh)
  if view.disaggregated:  # no program belongs to the mesh
    return _roles_fault(view)
  if view.executable != name:
    have = None if view.executable is None else sorted(view.executable)
    return f"the executable is of mesh {have}, the mesh is {sorted(name)}"
  return None


def _roles_fault(view: ClusterView) -> str | None:
  for ranks, work in ((request_ranks(view), "requests"),
                      (expert_ranks(view), "experts")):  # fmt: skip
    if not len(ranks):
      return f"0 of {len(view.mesh)} ranks in the mesh are for {work}"
  return None


def order_fault(view: ClusterView, ranks: Ranks) -> str | None:
  """Why `ranks` isn't the one order of the mesh that it names, else None."""
  order = mesh_named(view.launched, absent(view.launched, ranks))
  wrong = np.flatnonzero(order != np.asarray(ranks, np.int32))
  if len(wrong):
    i = wrong[0]
    return (
      f"rank {ranks[i]} at place {i} of the mesh, not {order[i]}: "
      "the order follows from the name (`view.mesh_named`)"
    )
  return None


def _coverage_fault(view: ClusterView) -> str | None:
  live = int((~view.masked).sum())
  if live < view.top_k:
    return f"{live} experts are not masked; a token needs {view.top_k}"
  missing = uncovered(view)
  if len(missing):
    return f"expert {missing[0]} has 0 live slots and is not masked"
  rank = view.table.entries[:, :, 0]
  wrong = (rank >= 0) & (view.role[rank] == Role.ATTENTION)
  if wrong.any():
    return f"an expert is routed to attention rank {rank[wrong][0]}"
  return None


def _rows_fault(view: ClusterView) -> str | None:
  table = view.requests
  may = np.zeros(len(view.status), bool)
  may[request_ranks(view)] = True
  may &= view.status == Status.SERVING
  stray = (table.rank >= 0) & ~may[table.rank]
  if stray.any():
    i = stray.argmax()
    rank = table.rank[i]
    status = Status(view.status[rank]).name
    return f"request {table.request_id[i]} sits on rank {rank}, {status}"
  return rows_fault(view, table.rank)


def rows_fault(view: ClusterView, rank: np.ndarray) -> str | None:
  """Which rank has too many rows when requests sit on `rank` [Q]."""
  held = np.bincount(rank[rank >= 0], minlength=1)
  if held.max() > view.rows_per_rank:
    return (
      f"rank {held.argmax()} would have {held.max()} rows; "
      f"its limit is {view.rows_per_rank}"
    )
  return None
