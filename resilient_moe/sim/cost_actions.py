"""What each action costs: stages one after the other, bytes by link.

`stages` is the breakdown, `price` its sum. Bytes of one stage flow over all
their links at once (`links.seconds`).

  Fence, RemapExperts, MaskExperts, Requeue, FailRequests, SwitchRole: fixed
  RebuildMesh      survivors agree and connect (`mesh_s`)
  FetchExecutable  warm, from the cache or compiled, as the view says
  CopyExperts      bytes by tier; the busiest device, node or NIC decides
  RestoreKV        bytes from a peer or the checkpoint store, then the suffix
  RecomputePrefix  prefill over prompt + tokens so far
  LaunchRank       process start, then the dense weights from disk
  Rejoin           mesh, and its programs unless roles are apart
  RestartInstance  process start, all weights from disk, programs, mesh,
                   every request prefilled again
  Verify           one step
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.packing import slots_needed
from resilient_moe.recovery.price import Cost, Hardware
from resilient_moe.recovery.request_effects import indices
from resilient_moe.recovery.view import ClusterView, Role, Tier, absent
from resilient_moe.sim import links
from resilient_moe.sim.cost_model import StepLoad

if TYPE_CHECKING:
  from resilient_moe.sim.cost import Roofline


PREFILL = "prefill"  # the stage that steps do, beside what decodes


class Stage(NamedTuple):
  """One part of an action."""

  name: str
  seconds: float
  traffic: tuple[links.Traffic, ...] = ()

  @property
  def nbytes(self) -> int:
    """Bytes that arrive; a link behind another carries the same ones."""
    if not self.traffic:
      return 0
    by_link = {t.link: t.nbytes for t in self.traffic}
    if "host" in by_link:  # disk or store, then host: once
      return by_link["host"]
    return sum(by_link.values())


Stages = tuple[Stage, ...]


def _moved(name: str, traffic: tuple[links.Traffic, ...]) -> Stages:
  took = links.seconds(traffic)
  return (Stage(name, took, traffic),) if traffic else ()


def _fixed(figure: str) -> Callable[..., Stages]:
  """A stage that is one number of the device."""
  return lambda model, action, view: (
    Stage(figure.removesuffix("_s"), float(getattr(model.device, figure))),
  )


def _programs(model: "Roofline", view: ClusterView, name: frozenset[int],
              stored: bool | None = None) -> Stage:  # fmt: skip
  """Programs of the mesh `name`; `stored`: whether the cache has them."""
  device = model.device
  if stored is None and name in view.ready:
    return Stage("warm", float(device.warm_s))
  if name in view.cached if stored is None else stored:
    return Stage("load_executable", float(device.load_executable_s))
  return Stage("compile", float(device.compile_s))


def _fetch(
  model: "Roofline", action: act.FetchExecutable, view: ClusterView
) -> Stages:
  return (_programs(model, view, action.absent),)


def _copy(
  model: "Roofline", action: act.CopyExperts, view: ClusterView
) -> Stages:
  moves = np.array(
    [(m.expert, m.rank, m.source) for m in action.moves], np.int64
  ).reshape(-1, 3)
  if not len(moves):
    return ()
  expert, to, source = moves.T
  size = np.full(len(to), float(view.expert_bytes))
  device, tier = model.device, action.tier
  if tier == Tier.PEER:
    traffic = links.peer(view, source, to, size, device)
  elif tier == Tier.LOCAL:
    traffic = links.local(to, size, device)
  elif tier == Tier.HOST:
    traffic = links.host(to, size, device)
  else:
    traffic = links.shared(view, to, size, tier, device, expert)
  begin = Stage("copy_latency", float(device.copy_latency_s))
  return (begin, *_moved(f"copy_{tier.value}", traffic))


def _prefill(
  model: "Roofline", view: ClusterView, to: np.ndarray, tokens: np.ndarray
) -> Stages:
  took = model.prefill_s(view, to, tokens)
  return (Stage(PREFILL, took),) if took else ()


def _restore(
  model: "Roofline", action: act.RestoreKV, view: ClusterView
) -> Stages:
  index, table = indices(view, action.requests), view.requests
  if not len(index):
    return ()
  to = np.asarray(action.to, np.int64)
  rank, holder = table.rank[index], table.checkpoint_rank[index]
  live = (rank >= 0) & view.alive()[rank] & (table.kv_tokens[index] > 0)
  live &= action.tier == Tier.PEER
  kv = np.where(live, table.kv_tokens[index], table.checkpoint_tokens[index])
  size = kv * float(view.token_kv_bytes)
  source = np.where(live, rank, holder).astype(np.int64)
  if action.tier == Tier.PEER:
    traffic = links.peer(view, source, to, size, model.device)
  elif action.tier == Tier.HOST:
    traffic = links.checkpointed(view, to, size, model.device)
  else:
    traffic = links.shared(view, to, size, action.tier, model.device)
  length = table.prompt_tokens[index] + table.emitted_tokens[index]
  suffix = np.where(live, 0, np.maximum(length - kv, 0))
  begin = Stage("copy_latency", float(model.device.copy_latency_s))
  moved = _moved(f"restore_{action.tier.value}", traffic)
  return (begin, *moved, *_prefill(model, view, to, suffix))


def _recompute(
  model: "Roofline", action: act.RecomputePrefix, view: ClusterView
) -> Stages:
  index, table = indices(view, action.requests), view.requests
  tokens = table.prompt_tokens[index] + table.emitted_tokens[index]
  return _prefill(model, view, np.asarray(action.to, np.int64), tokens)


def _launch(
  model: "Roofline", action: act.LaunchRank, view: ClusterView
) -> Stages:
  start = Stage("process_start", float(model.device.process_start_s))
  if view.home[action.rank] == Role.EXPERT:
    return (start,)
  to = np.array([action.rank], np.int64)
  size = np.array([float(model.shape.dense_bytes)])
  traffic = links.shared(view, to, size, Tier.DISK, model.device)
  return (start, *_moved("weights", traffic))


def _rejoin(
  model: "Roofline", action: act.Rejoin, view: ClusterView
) -> Stages:
  mesh = Stage("mesh", float(model.device.mesh_s))
  if view.disaggregated:
    return (mesh,)
  name = absent(view.launched, [*view.mesh.tolist(), action.rank])
  return (mesh, _programs(model, view, name))


def _restart(
  model: "Roofline", action: act.RestartInstance, view: ClusterView
) -> Stages:
  """Slots are taken as dealt evenly (as `recovery.price` does)."""
  ranks = np.asarray(action.ranks, np.int64)
  holders = ranks[view.home[ranks] != Role.ATTENTION]
  serving = ranks[view.home[ranks] != Role.EXPERT]
  need = slots_needed(view.n_experts, len(holders))
  copies = max(view.table.entries.shape[1], 1)
  room = len(holders) * max(need, view.slots_per_rank)
  filled = np.arange(min(copies * view.n_experts, room))
  to = np.concatenate([holders[filled % len(holders)], serving])
  item = np.concatenate(
    [filled % view.n_experts, np.full(len(serving), view.n_experts)]
  )
  size = np.where(
    item < view.n_experts, float(view.expert_bytes), model.shape.dense_bytes
  )
  weights = links.shared(view, to, size, Tier.DISK, model.device, item)
  name = absent(view.launched, ranks)
  known = bool(view.cached) if view.disaggregated else name in view.cached
  stored = action.cache and known and need <= view.slots_per_rank
  device, table = model.device, view.requests
  tokens = table.prompt_tokens + table.emitted_tokens
  dealt = serving[np.arange(len(tokens)) % max(len(serving), 1)]
  return (
    Stage("process_start", float(device.process_start_s)),
    *_moved("weights", weights),
    _programs(model, view, name, stored),
    Stage("mesh", float(device.mesh_s)),
    *_prefill(model, view, dealt, tokens),
  )


def _verify(
  model: "Roofline", action: act.Verify, view: ClusterView
) -> Stages:
  del action
  return (Stage("step", _busy_step_s(model, view)),)


STAGES: dict[type[act.Action], Callable[..., Stages]] = {
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
  act.LaunchRank: _launch,
  act.Rejoin: _rejoin,
  act.RestartInstance: _restart,
  act.Verify: _verify,
}


def stages(
  model: "Roofline", action: act.Action, view: ClusterView
) -> Stages:
  """What `action` does from `view`, one stage after the other."""
  return STAGES[type(action)](model, action, view)


def price(model: "Roofline", action: act.Action, view: ClusterView) -> Cost:
  """Seconds and bytes of all its stages."""
  parts = stages(model, action, view)
  return Cost(sum(p.seconds for p in parts), sum(p.nbytes for p in parts))


def _decoding(view: ClusterView) -> StepLoad:
  """The view's running requests as one decode step; one row each if none."""
  ranks = request_ranks(view).astype(np.int64)
  n, table = len(view.status), view.requests
  runs = table.rank >= 0
  rows = np.bincount(table.rank[runs], minlength=n)[ranks].astype(float)
  held = np.bincount(table.rank[runs], table.kv_tokens[runs], n)[ranks]
  if not rows.any():
    rows = np.ones(len(ranks))
  zero = np.zeros(len(ranks))
  return StepLoad(ranks, rows, held, zero, zero)


def _servable(view: ClusterView) -> bool:
  """Enough experts are routed for a step to have a time."""
  return bool((view.table.copies() > 0).any() and len(request_ranks(view)))


def _busy_step_s(model: "Roofline", view: ClusterView) -> float:
  return model.step_s(view, _decoding(view)) if _servable(view) else 0.0


def hardware(model: "Roofline", view: ClusterView) -> Hardware:
  """See `Roofline.hardware`."""
  device = model.device
  one_node = (view.host == view.host[0]).all()
  peer = device.intra if one_node else device.inter
  prefill = 1.0
  if _servable(view):
    ranks = request_ranks(view).astype(np.int64)
    took = model.prefill_s(view, ranks, np.full(len(ranks), model.chunk))
    prefill = model.chunk / took
  return Hardware(
    name=f"{device.name}, {model.shape.name}",
    local_bytes_per_s=model.memory_rate / 2,
    peer_bytes_per_s=float(peer.bytes_per_s),
    host_bytes_per_s=float(device.host.bytes_per_s),
    store_bytes_per_s=float(device.store.bytes_per_s),
    disk_bytes_per_s=float(device.disk.bytes_per_s),
    shared_by_host=True,
    copy_latency_s=float(device.copy_latency_s),
    fence_s=float(device.fence_s),
    mesh_s=float(device.mesh_s),
    warm_s=float(device.warm_s),
    load_executable_s=float(device.load_executable_s),
    compile_s=float(device.compile_s),
    table_s=float(device.table_s),
    requeue_s=float(device.requeue_s),
    role_s=float(device.role_s),
    process_start_s=float(device.process_start_s),
    prefill_tokens_per_s=prefill,
    step_s=_busy_step_s(model, view),
  )
