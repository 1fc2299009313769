"""The first views of an instance: bare, standing, and big ones to measure.

A backend starts from `bare_view`, asks the policy to `prepare` on it, and
serves from `stand(view, standing)`.
"""

import dataclasses

import numpy as np

from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.effects import sealed
from resilient_moe.recovery.packing import deal
from resilient_moe.recovery.policy import (
  RecoveryPolicy,
  Standing,
  misplaced,
)
from resilient_moe.recovery.view import (
  ClusterView,
  RequestTable,
  Role,
  RoutingTable,
  Status,
  no_requests,
)


def bare_view(
  ranks: int,
  experts: int,
  *,
  spares: int = 0,
  top_k: int = 2,
  rows_per_rank: int = 4,
  ranks_per_host: int = 0,
  hosts_per_rack: int = 0,
  expert_bytes: int = 1 << 20,
  token_kv_bytes: int = 1 << 10,
  on_disk: bool = True,
  attention: int = 0,
) -> ClusterView:
  """What `prepare` gets: N = ranks + spares, no slots, no requests.

  0 ranks per host puts all on one host, 0 hosts per rack all in one rack.
  The first `attention` ranks do attention and the others hold experts; 0:
  every rank does both.
  """
  n = ranks + spares
  rank = np.arange(n)
  host = rank // (ranks_per_host or n)
  status = np.where(rank < ranks, Status.SERVING, Status.SPARE)
  role = np.where(rank < attention, Role.ATTENTION, Role.EXPERT)
  role = sealed(role if attention else 0 * rank, np.int8)
  return ClusterView(
    epoch=0,
    status=sealed(status, np.int8),
    role=role,
    home=role,
    host=sealed(host, np.int32),
    rack=sealed(host // (hosts_per_rack or n), np.int32),
    launched=tuple(range(ranks)),
    mesh=sealed(rank[:ranks], np.int32),
    slots=sealed(np.zeros((n, 0)), np.int32),
    table=RoutingTable(sealed(np.zeros((experts, 0, 2)), np.int32)),
    masked=sealed(np.zeros(experts), bool),
    in_host_memory=sealed(np.zeros(experts), bool),
    on_disk=on_disk,
    ready=frozenset(),
    cached=frozenset(),
    executable=frozenset(),
    rows_per_rank=rows_per_rank,
    top_k=top_k,
    expert_bytes=expert_bytes,
    token_kv_bytes=token_kv_bytes,
    requests=no_requests(),
  )


def stand(view: ClusterView, standing: Standing) -> ClusterView:
  """The bare `view` with what a policy keeps standing, before traffic."""
  ready = frozenset({frozenset[int](), *standing.ready})
  return dataclasses.replace(
    view,
    slots=sealed(standing.slots, np.int32),
    table=standing.table,
    rows_per_rank=standing.rows_per_rank,
    in_host_memory=sealed(
      np.full(view.n_experts, standing.host_weights), bool
    ),
    ready=ready,
    cached=ready if standing.store_executables else frozenset(),
  )


def with_requests(
  view: ClusterView,
  n: int,
  *,
  prompt_tokens: int = 100,
  emitted_tokens: int = 20,
  checkpoint: str = "none",
  lag_tokens: int = 2,
) -> ClusterView:
  """The view with `n` requests in mid-decode, dealt evenly; the rest queue.

  With `checkpoint` their KV is committed up to `lag_tokens` before the end,
  on the next rank of the mesh (`peer`) or with the host.
  """
  ranks = request_ranks(view)
  zero = np.zeros(len(ranks), np.int64)
  seats = deal(zero, zero + view.rows_per_rank, n)
  rank = np.full(n, -1)
  rank[: len(seats)] = ranks[seats]
  runs = rank >= 0
  kv = np.where(runs, prompt_tokens + emitted_tokens - 1, 0)
  holder = np.full(n, -1)
  if checkpoint == "peer":
    holder[: len(seats)] = np.roll(ranks, -1)[seats]
  kept = np.maximum(kv - lag_tokens, 0) * (checkpoint != "none")
  columns = (
    rank,
    np.full(n, prompt_tokens),
    np.where(runs, emitted_tokens, 0),
    kv,
    kept,
    holder,
  )
  arrays = (sealed(c, np.int32) for c in columns)
  names = tuple(f"r{i:04d}" for i in range(n))
  return dataclasses.replace(view, requests=RequestTable(names, *arrays))


def start(
  policy: RecoveryPolicy, view: ClusterView, requests: int = 0
) -> ClusterView:
  """The bare `view` as `policy` prepares it, with requests in mid-decode.

  Raises:
    ValueError: the policy is for another deployment.
  """
  reason = misplaced(policy.name, policy.deployments, view)
  if reason:
    raise ValueError(reason)
  standing = policy.prepare(view)
  return with_requests(
    stand(view, standing), requests, checkpoint=standing.checkpoint
  )


def big_view(
  n_ranks: int = 10_240,
  n_experts: int = 256,
  slots_per_rank: int = 2,
  n_requests: int = 2_000,
  *,
  checkpoint: str = "peer",
  rows_per_rank: int = 8,
  attention: int = 0,
) -> ClusterView:
  """A large instance in mid-decode, for benchmarks of planning.

  Copy j of expert e lies on expert rank (j * E + e) mod their number: copies
  are on other racks without a search; one slot a rank stays empty if there
  are two or more. The first `attention` ranks hold no experts.
  """
  view = bare_view(
    n_ranks, n_experts, ranks_per_host=8, hosts_per_rack=4, top_k=8,
    attention=attention,
  )  # fmt: skip
  filled, holders = max(slots_per_rank - 1, 1), n_ranks - attention
  place = np.arange(holders * filled)
  rank, slot = attention + place % holders, place // holders
  slots = np.full((n_ranks, slots_per_rank), -1)
  slots[rank, slot] = place % n_experts
  copies = -(-len(place) // n_experts)
  entries = np.full((n_experts, copies, 2), -1)
  entries[place % n_experts, place // n_experts, 0] = rank
  entries[place % n_experts, place // n_experts, 1] = slot
  standing = Standing(
    slots=sealed(slots, np.int32),
    table=RoutingTable(sealed(entries, np.int32)),
    rows_per_rank=rows_per_rank,
    checkpoint=checkpoint,
    host_weights=True,
  )
  return with_requests(stand(view, standing), n_requests, checkpoint=checkpoint)
