"""What an action costs on given hardware: seconds and bytes.

Prices are for choosing between plans and for the simulator, which adds links
and queues of its own. An action's bytes move in parallel between ranks: the
busiest rank decides. Unknown numbers are defaults to be calibrated.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.packing import slots_needed
from resilient_moe.recovery.plan import Plan, ordered
from resilient_moe.recovery.request_effects import indices
from resilient_moe.recovery.semantics import advance
from resilient_moe.recovery.view import ClusterView, Role, Tier, absent

Amount = float | np.ndarray  # one for all, or one each


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Rates and fixed times that prices are made of."""

  name: str
  local_bytes_per_s: float  # within a device's memory
  peer_bytes_per_s: float  # device to device, each rank
  host_bytes_per_s: float  # host memory to device, each rank
  store_bytes_per_s: float  # remote host or store; who shares it: see below
  disk_bytes_per_s: float
  copy_latency_s: float  # to start one copy action
  fence_s: float
  mesh_s: float  # survivors agree on a mesh
  warm_s: float  # programs of a ready mesh: looked up, already run
  load_executable_s: float  # from the store, connections included
  compile_s: float  # every program of a mesh, connections included
  table_s: float  # swap a routing table or mask
  requeue_s: float
  role_s: float
  process_start_s: float
  prefill_tokens_per_s: float  # each rank
  step_s: float  # one decode step
  shared_by_host: bool = False  # store and disk: each host has its own way to
  # them, else all ranks share one


# "This machine": two CPU cores, 8 virtual devices, the shipped model. Orders
# of magnitude measured on it while the project began; defaults that
# `experiments/calibrate.py` replaces by what runs say.
THIS_MACHINE = Hardware(
  name="this machine (defaults, to be calibrated)",
  local_bytes_per_s=4e9,
  peer_bytes_per_s=2e9,
  host_bytes_per_s=2e9,
  store_bytes_per_s=5e8,
  disk_bytes_per_s=5e8,
  copy_latency_s=1e-3,
  fence_s=1e-3,
  mesh_s=5e-3,
  warm_s=2e-3,
  load_executable_s=0.2,
  compile_s=8.0,
  table_s=5e-4,
  requeue_s=1e-4,
  role_s=1e-3,
  process_start_s=3.0,
  prefill_tokens_per_s=4e3,
  step_s=8e-3,
)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Seconds that pass and bytes that move."""

  seconds: float = 0.0
  bytes: int = 0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.seconds + other.seconds, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class PlanPrice:
  """A plan's price; the parts are sums of `by_action`, in execution order."""

  resume: Cost
  repair: Cost
  by_action: tuple[tuple[act.Action, Cost], ...]


def _rate(tier: Tier, hardware: Hardware) -> float:
  return getattr(hardware, f"{tier.value}_bytes_per_s")


def _busiest(ranks: np.ndarray, weight: Amount) -> float:
  """The largest sum of `weight` (scalar or [.]) that one rank gets."""
  if not len(ranks):
    return 0.0
  weights = np.broadcast_to(np.asarray(weight, float), np.shape(ranks))
  return float(np.bincount(ranks, weights).max())


def _transfer(
  view: ClusterView,
  ranks: np.ndarray,
  sizes: Amount,
  tier: Tier,
  hardware: Hardware,
) -> Cost:
  """Bytes `sizes` [.] to `ranks` [.]; store and disk serve sharers in turn."""
  sizes = np.broadcast_to(np.asarray(sizes, float), np.shape(ranks))
  total = float(sizes.sum())
  ends = ranks
  if tier in (Tier.STORE, Tier.DISK):
    ends = view.host[ranks] if hardware.shared_by_host else 0 * ranks
  bottleneck = _busiest(ends, sizes)
  seconds = hardware.copy_latency_s + bottleneck / _rate(tier, hardware)
  return Cost(seconds, int(total))


def _fetch_s(view: ClusterView, name: frozenset[int], hw: Hardware) -> float:
  if name in view.ready:
    return hw.warm_s
  return hw.load_executable_s if name in view.cached else hw.compile_s


def _copy(action: act.CopyExperts, view: ClusterView, hw: Hardware) -> Cost:
  to = np.array([m.rank for m in action.moves], np.int64)
  if not len(to):
    return Cost()
  size = view.expert_bytes
  cost = _transfer(view, to, size, action.tier, hw)
  source = np.array([m.source for m in action.moves], np.int64)
  if action.tier != Tier.PEER:
    return cost
  read = _transfer(view, source, size, Tier.PEER, hw)
  return Cost(max(cost.seconds, read.seconds), cost.bytes)


def _prefill_s(ranks: np.ndarray, tokens: Amount, hw: Hardware) -> float:
  """Each rank prefills its own; at least one step, if there is anything."""
  busiest = _busiest(ranks, tokens)
  return max(busiest / hw.prefill_tokens_per_s, hw.step_s) if busiest else 0.0


def _restore(action: act.RestoreKV, view: ClusterView, hw: Hardware) -> Cost:
  index, table = indices(view, action.requests), view.requests
  if not len(index):
    return Cost()
  rank = table.rank[index]
  live = (rank >= 0) & view.alive()[rank] & (table.kv_tokens[index] > 0)
  live &= action.tier == Tier.PEER
  kv = np.where(live, table.kv_tokens[index], table.checkpoint_tokens[index])
  to = np.asarray(action.to, np.int64)
  size = kv * float(view.token_kv_bytes)
  cost = _transfer(view, to, size, action.tier, hw)
  length = table.prompt_tokens[index] + table.emitted_tokens[index]
  suffix = np.where(live, 0, np.maximum(length - kv, 0))
  return cost + Cost(_prefill_s(to, suffix, hw))


def _recompute(
  action: act.RecomputePrefix, view: ClusterView, hw: Hardware
) -> Cost:
  index, table = indices(view, action.requests), view.requests
  tokens = table.prompt_tokens[index] + table.emitted_tokens[index]
  return Cost(_prefill_s(np.asarray(action.to, np.int64), tokens, hw))


def _rejoin(action: act.Rejoin, view: ClusterView, hw: Hardware) -> Cost:
  if view.disaggregated:  # it has run its own programs before it joins
    return Cost(hw.mesh_s)
  name = absent(view.launched, [*view.mesh.tolist(), action.rank])
  return Cost(hw.mesh_s + _fetch_s(view, name, hw))


def _restart(
  action: act.RestartInstance, view: ClusterView, hw: Hardware
) -> Cost:
  """Process start, weights of every filled slot, programs, all prefills.

  Slots are taken as dealt evenly: to place every expert only to count them
  would cost more than the rest of a plan at 10,240 ranks.
  """
  ranks = np.asarray(action.ranks, np.int64)
  name = absent(view.launched, ranks)
  holders = ranks[view.home[ranks] != Role.ATTENTION]
  serving = ranks[view.home[ranks] != Role.EXPERT]
  need = slots_needed(view.n_experts, len(holders))
  # Programs of other shapes (more slots) are not in the store.
  # Where roles are apart they are no mesh's.
  known = bool(view.cached) if view.disaggregated else name in view.cached
  stored = action.cache and known
  stored = stored and need <= view.slots_per_rank
  programs = hw.load_executable_s if stored else hw.compile_s
  copies = max(view.table.entries.shape[1], 1)
  room = len(holders) * max(need, view.slots_per_rank)
  filled = np.arange(min(copies * view.n_experts, room))
  rank = holders[filled % len(holders)]
  weights = _transfer(view, rank, view.expert_bytes, Tier.DISK, hw)
  table = view.requests
  tokens = table.prompt_tokens + table.emitted_tokens
  dealt = serving[np.arange(len(tokens)) % max(len(serving), 1)]
  prefill = _prefill_s(dealt, tokens, hw)
  return weights + Cost(hw.process_start_s + programs + prefill)


def _fetch(
  action: act.FetchExecutable, view: ClusterView, hw: Hardware
) -> Cost:
  return Cost(_fetch_s(view, action.absent, hw))


def _fixed(field: str) -> Callable[..., Cost]:
  """A price that is one fixed time of the hardware."""
  return lambda action, view, hardware: Cost(getattr(hardware, field))


PRICE: dict[type[act.Action], Callable[..., Cost]] = {
  act.Fence: _fixed("fence_s"),
  act.RebuildMesh: _fixed("mesh_s"),
  act.FetchExecutable: _fetch,
  act.CopyExperts: _copy,
  act.RemapExperts: _fixed("table_s"),
  act.MaskExperts: _fixed("table_s"),
  act.RestoreKV: _restore,
  act.RecomputePrefix: _recompute,
  act.Requeue: _fixed("requeue_s"),
  act.FailRequests: _fixed("requeue_s"),
  act.SwitchRole: _fixed("role_s"),
  act.LaunchRank: _fixed("process_start_s"),
  act.Rejoin: _rejoin,
  act.RestartInstance: _restart,
  act.Verify: _fixed("step_s"),
}


def price(action: act.Action, view: ClusterView, hardware: Hardware) -> Cost:
  """What `action` costs when done from `view`."""
  return PRICE[type(action)](action, view, hardware)


def price_plan(
  plan: Plan, view: ClusterView, hardware: Hardware
) -> PlanPrice:
  """Prices the actions one after the other, advancing the view along."""
  by_action: list[tuple[act.Action, Cost]] = []
  parts = []
  for part in (plan.resume, plan.repair):
    total = Cost()
    for action in ordered(part):
      if by_action:  # what the last action leaves is nobody's start
        view = advance(view, by_action[-1][0])
      cost = price(action, view, hardware)
      by_action.append((action, cost))
      total = total + cost
    parts.append(total)
  return PlanPrice(parts[0], parts[1], tuple(by_action))
