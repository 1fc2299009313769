"""How displaced requests go on: prefill again, restored KV, or an error."""

from collections.abc import Callable

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.choices import Actions, Requests
from resilient_moe.recovery.rescue import spread_requests
from resilient_moe.recovery.view import ClusterView, Tier


def re_prefill() -> Requests:
  """Prefill again over prompt + tokens so far."""
  return Requests(lambda view: _move(view, _prefill_again))


def restore_kv(checkpoint: str = "peer") -> Requests:
  """From checkpointed KV, plus the suffix that trailed.

  KV streams to a neighbour's memory (`peer`) or to the host's. A request
  whose checkpoint is gone is prefilled again.
  """
  if checkpoint not in ("peer", "host"):
    raise ValueError(f"checkpoint={checkpoint!r}; choices: host, peer")
  return Requests(lambda view: _move(view, _from_checkpoint), checkpoint)


def fail() -> Requests:
  """End them with an error; the client may send them again."""
  return Requests(
    lambda view: _move(view, _give_up, seat=False), fails_requests=True
  )


Go = Callable[[ClusterView, np.ndarray, np.ndarray], Actions]


def _move(view: ClusterView, go: Go, seat: bool = True) -> Actions:
  """New seats for displaced requests; `go` says how they get their KV.

  Live KV on a rank that leaves is handed over whatever the choice. Requests
  that lost their KV where they sit (in a recovery that was abandoned) stay.
  """
  table = view.requests
  member = np.zeros(len(view.status), bool)
  member[request_ranks(view)] = True
  away = (table.rank >= 0) & ~member[table.rank]
  bare = (table.rank >= 0) & ~away
  bare &= (table.kv_tokens == 0) & (table.emitted_tokens > 0)
  live = away & view.alive()[table.rank] & (table.kv_tokens > 0)
  movers = np.flatnonzero(away & (seat | live))
  to = table.rank.astype(np.int64)
  to[movers] = spread_requests(view, movers)
  placed, queued = movers[to[movers] >= 0], movers[to[movers] < 0]
  handed = placed[live[placed]]
  others = away & ~live & ((to >= 0) | (not seat))
  if not seat:  # they were not on a lost rank: no reason to end them
    actions = _prefill_again(view, np.flatnonzero(bare), to[bare])
  else:
    actions, others = (), others | bare
  actions += _some(act.RestoreKV, view, handed, to[handed], Tier.PEER)
  actions += go(view, np.flatnonzero(others), to[others])
  return actions + _some(act.Requeue, view, queued)


def _some(
  action: Callable[..., act.Action],
  view: ClusterView,
  index: np.ndarray,
  *rest: np.ndarray | Tier,
) -> Actions:
  """`action` over the requests `index`, or nothing if there are none."""
  if not len(index):
    return ()
  names = tuple(view.requests.request_id[i] for i in index.tolist())
  more = (tuple(r.tolist()) if isinstance(r, np.ndarray) else r for r in rest)
  return (action(names, *more),)


def _prefill_again(
  view: ClusterView, index: np.ndarray, to: np.ndarray
) -> Actions:
  return _some(act.RecomputePrefix, view, index, to)


def _from_checkpoint(
  view: ClusterView, index: np.ndarray, to: np.ndarray
) -> Actions:
  table = view.requests
  holder, kept = table.checkpoint_rank[index], table.checkpoint_tokens[index]
  peer = (kept > 0) & (holder >= 0) & view.alive()[holder]
  host = (kept > 0) & (holder < 0)
  again = ~peer & ~host
  return (
    _some(act.RestoreKV, view, index[peer], to[peer], Tier.PEER)
    + _some(act.RestoreKV, view, index[host], to[host], Tier.HOST)
    + _prefill_again(view, index[again], to[again])
  )


def _give_up(
  view: ClusterView, index: np.ndarray, to: np.ndarray
) -> Actions:
  del to
  return _some(act.FailRequests, view, index)
