"""What the actions on requests do to a view: seats, KV, queue."""

import dataclasses

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import (
  IllegalPlan,
  request_ranks,
  rows_fault,
)
from resilient_moe.recovery.effects import known, sealed
from resilient_moe.recovery.view import (
  ClusterView,
  RequestTable,
  Status,
  Tier,
)

Ints = np.ndarray | int


def indices(view: ClusterView, requests: tuple[str, ...]) -> np.ndarray:
  """Rows of the named requests, [.] int64; an unknown or double one errs."""
  row = {name: i for i, name in enumerate(view.requests.request_id)}
  for name in requests:
    if name not in row:
      raise IllegalPlan(f"unknown request {name!r}; there are {len(row)}")
  if len(set(requests)) < len(requests):
    twice = next(n for n in requests if requests.count(n) > 1)
    raise IllegalPlan(f"request {twice!r} is listed twice")
  return np.array([row[name] for name in requests], np.int64)


def _destinations(
  view: ClusterView, requests: tuple[str, ...], to: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Rows and ranks [.] of requests that move; wrong ranks are an error."""
  if len(requests) != len(to):
    raise IllegalPlan(f"{len(requests)} requests, but {len(to)} ranks")
  ranks = known(view, to)
  may = np.zeros(len(view.status), bool)
  may[request_ranks(view)] = True
  may &= view.status == Status.SERVING
  if not may[ranks].all():
    i = int((~may[ranks]).argmax())
    status = Status(view.status[ranks[i]]).name
    raise IllegalPlan(
      f"request {requests[i]!r} to rank {ranks[i]}, which is {status} "
      "or takes no requests"
    )
  return indices(view, requests), ranks


def restore_kv(view: ClusterView, action: act.RestoreKV) -> ClusterView:
  """Live KV is handed over, else as much as the checkpoint has."""
  index, to = _destinations(view, action.requests, action.to)
  table = view.requests
  rank = table.rank[index]
  live = (rank >= 0) & view.alive()[rank] & (table.kv_tokens[index] > 0)
  live &= action.tier == Tier.PEER
  gone = ~live & (table.checkpoint_tokens[index] <= 0)
  if gone.any():
    name = action.requests[int(gone.argmax())]
    raise IllegalPlan(f"request {name!r} has 0 checkpointed tokens to restore")
  on_rank = table.checkpoint_rank[index] >= 0
  wrong = ~live & (on_rank != (action.tier == Tier.PEER))
  if wrong.any():
    i = int(wrong.argmax())
    holder = table.checkpoint_rank[index[i]]
    raise IllegalPlan(
      f"request {action.requests[i]!r} has its checkpoint on "
      f"{'the host' if holder < 0 else f'rank {holder}'}, "
      f"not in tier {action.tier}"
    )
  kv = np.where(live, table.kv_tokens[index], table.checkpoint_tokens[index])
  return _seat(view, index, rank=to, kv_tokens=kv)


def recompute_prefix(
  view: ClusterView, action: act.RecomputePrefix
) -> ClusterView:
  """A seat without KV: the scheduler prefills from the first position."""
  index, to = _destinations(view, action.requests, action.to)
  return _seat(view, index, rank=to, kv_tokens=0)


def requeue(view: ClusterView, action: act.Requeue) -> ClusterView:
  """No seat, no KV; the tokens are kept."""
  index = indices(view, action.requests)
  return _seat(view, index, rank=-1, kv_tokens=0)


def fail_requests(
  view: ClusterView, action: act.FailRequests
) -> ClusterView:
  """The requests are no longer the instance's."""
  keep = np.ones(len(view.requests.request_id), bool)
  keep[indices(view, action.requests)] = False
  return dataclasses.replace(view, requests=_kept(view.requests, keep))


def _seat(
  view: ClusterView, index: np.ndarray, rank: Ints, kv_tokens: Ints
) -> ClusterView:
  """Requests `index` on `rank` with `kv_tokens` (both [.] or scalar)."""
  table = view.requests
  ranks, tokens = table.rank.copy(), table.kv_tokens.copy()
  ranks[index], tokens[index] = rank, kv_tokens
  live = np.where((ranks >= 0) & view.alive()[ranks], ranks, -1)
  reason = rows_fault(view, live)
  if reason:
    raise IllegalPlan(reason)
  requests = dataclasses.replace(
    table, rank=sealed(ranks, np.int32), kv_tokens=sealed(tokens, np.int32)
  )
  return dataclasses.replace(view, requests=requests)


def _kept(table: RequestTable, keep: np.ndarray) -> RequestTable:
  """The rows of `table` where `keep` [Q] bool."""
  names = (n for n, k in zip(table.request_id, keep, strict=True) if k)
  columns = [f.name for f in dataclasses.fields(table)][1:]
  arrays = (sealed(getattr(table, c)[keep], np.int32) for c in columns)
  return RequestTable(tuple(names), *arrays)


def all_queued(table: RequestTable) -> RequestTable:
  """All requests in the queue: no rank, no KV, no checkpoint."""
  q = len(table.request_id)
  zero, none = sealed(np.zeros(q), np.int32), sealed(np.full(q, -1), np.int32)
  return dataclasses.replace(
    table,
    rank=none,
    kv_tokens=zero,
    checkpoint_tokens=zero,
    checkpoint_rank=none,
  )
