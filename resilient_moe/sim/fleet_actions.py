"""What actions of a plan add to a group's sums."""

from typing import Any

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.request_effects import indices
from resilient_moe.recovery.view import ClusterView
from resilient_moe.sim.fleet_queue import Queue
from resilient_moe.sim.fleet_requests import tokens_of
from resilient_moe.sim.fleet_tally import Tally


def account(
  tally: Tally,
  record: dict[str, Any],
  view: ClusterView,
  action: act.Action,
  nbytes: int,
) -> None:
  """Adds what `action`, carried out from `view`, moves and computes again."""
  recomputed = 0
  if isinstance(action, act.RecomputePrefix):
    recomputed = tokens_of(view, action.requests)
  elif isinstance(action, act.RestartInstance):
    recomputed = tokens_of(view, view.requests.request_id)
  elif isinstance(action, act.RestoreKV):
    recomputed = _suffix(view, action)
    tally.kv_bytes += nbytes
  elif isinstance(action, act.FailRequests):
    index = indices(view, action.requests)
    tally.requests_lost += len(index)
    tally.tokens_lost += int(view.requests.emitted_tokens[index].sum())
  if isinstance(action, act.CopyExperts | act.RestartInstance):
    tally.weight_bytes += nbytes
  tally.tokens_recomputed += recomputed
  if record:
    record["recomputed"] = record.get("recomputed", 0) + recomputed


def _suffix(view: ClusterView, action: act.RestoreKV) -> int:
  """Tokens behind the checkpoints of requests whose own KV is gone."""
  index, table = indices(view, action.requests), view.requests
  rank = table.rank[index]
  live = (rank >= 0) & view.alive()[rank] & (table.kv_tokens[index] > 0)
  length = table.prompt_tokens[index] + table.emitted_tokens[index]
  behind = np.maximum(length - table.checkpoint_tokens[index], 0)
  return int(behind[~live].sum())


def return_requests(queue: Queue, action: act.Action) -> None:
  """Requests that leave their rows wait again, or are sent again."""
  if isinstance(action, act.Requeue):
    queue.take_back(len(action.requests))
  elif isinstance(action, act.FailRequests):
    queue.fail(len(action.requests))


def serves_alike(before: ClusterView, after: ClusterView) -> bool:
  """Whether a step takes the same time on both."""
  return (
    before.mesh is after.mesh
    and before.table is after.table
    and before.masked is after.masked
    and before.role is after.role
    and before.slots_per_rank == after.slots_per_rank
  )
