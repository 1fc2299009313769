"""What the world is after an action: the definition of every action.

`advance(view, action)` is pure: views are never written, only replaced. An
action that can't be done from a view raises `IllegalPlan`. `lose` is the
ground truth of a loss, before anybody has recovered.

Epochs: every action that changes who is in (Fence, RebuildMesh to another set
of ranks, Rejoin, RestartInstance) counts one, so that a plan which forgets the
fence still can't let old work in. Fencing is a loss: nothing is read from the
rank afterwards. A rank that is to be drained is therefore first left out by
RebuildMesh (it becomes a SPARE and can be read), and fenced at the end.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery import expert_effects, request_effects
from resilient_moe.recovery.checks import (
  IllegalPlan,
  expert_ranks,
  order_fault,
  plannable,
  request_ranks,
  servable,
)
from resilient_moe.recovery.effects import known, lose, sealed, without
from resilient_moe.recovery.packing import routing_table, slots_needed
from resilient_moe.recovery.placement import place
from resilient_moe.recovery.view import (
  ClusterView,
  Role,
  Status,
  absent,
  mesh_named,
)

__all__ = [
  "IllegalPlan",
  "advance",
  "advance_all",
  "lose",
  "plannable",
  "servable",
]


def _fence(view: ClusterView, action: act.Fence) -> ClusterView:
  return dataclasses.replace(lose(view, action.ranks), epoch=view.epoch + 1)


def _rebuild_mesh(view: ClusterView, action: act.RebuildMesh) -> ClusterView:
  ranks = known(view, action.ranks)
  if not len(ranks):
    raise IllegalPlan("the mesh has 0 ranks; at least 1 must serve")
  times = np.bincount(ranks)
  if times.max() > 1:
    raise IllegalPlan(f"rank {times.argmax()} is twice in the mesh")
  dead = ranks[~view.alive()[ranks]]
  if len(dead):
    what = Status(view.status[dead[0]]).name
    raise IllegalPlan(f"rank {dead[0]} is {what}; a member must be alive")
  reason = order_fault(view, ranks)
  if reason:
    raise IllegalPlan(reason)
  return _with_mesh(view, ranks)


def _with_mesh(view: ClusterView, mesh: np.ndarray) -> ClusterView:
  """The view with `mesh` [R] serving and the other live ranks spare."""
  status = np.where(view.alive(), np.int8(Status.SPARE), view.status)
  status[mesh] = Status.SERVING
  outside = np.ones(len(status), bool)
  outside[mesh] = False
  name = absent(view.launched, mesh)
  changed = name != absent(view.launched, view.mesh)
  return dataclasses.replace(
    view,
    epoch=view.epoch + int(changed),
    status=sealed(status, np.int8),
    mesh=sealed(mesh, np.int32),
    table=without(view.table, outside),
    executable=name if view.executable == name else None,
  )


def _fetch(view: ClusterView, action: act.FetchExecutable) -> ClusterView:
  """The mesh's own programs become current; another's are made ready."""
  mine = action.absent == absent(view.launched, view.mesh)
  return dataclasses.replace(
    view,
    ready=view.ready | {action.absent},
    executable=action.absent if mine else view.executable,
  )


def _switch_role(view: ClusterView, action: act.SwitchRole) -> ClusterView:
  """Who stops attending keeps its KV until its requests have moved."""
  if not view.disaggregated or action.role == Role.COLLOCATED:
    raise IllegalPlan(
      f"rank {action.rank} can't become {Role(action.role).name}: roles are "
      "switched between ATTENTION and EXPERT, where they are apart"
    )
  rank = int(known(view, (action.rank,))[0])
  if not view.alive()[rank]:
    status = Status(view.status[rank]).name
    raise IllegalPlan(f"rank {rank} is {status}; only a live one switches")
  role = view.role.copy()
  role[rank] = Role(action.role)
  view = dataclasses.replace(view, role=sealed(role, np.int8))
  return _emptied(view, rank) if action.role == Role.ATTENTION else view


def _emptied(view: ClusterView, rank: int) -> ClusterView:
  """Who attends holds no experts."""
  gone = np.zeros(len(view.status), bool)
  gone[rank] = True
  slots = np.where(gone[:, None], -1, view.slots)
  return dataclasses.replace(
    view, slots=sealed(slots, np.int32), table=without(view.table, gone)
  )


def _launch(view: ClusterView, action: act.LaunchRank) -> ClusterView:
  rank = int(known(view, (action.rank,))[0])
  if view.status[rank] != Status.LOST:
    what = Status(view.status[rank]).name
    raise IllegalPlan(f"rank {rank} is {what}; only a LOST one is replaced")
  status, role = view.status.copy(), view.role.copy()
  status[rank], role[rank] = Status.LAUNCHING, view.home[rank]
  # A replacement is another device: programs made for its predecessor are
  # of no use to it.
  first = rank in view.launched
  ready = {n for n in view.ready if (rank in n if first else ~rank not in n)}
  return dataclasses.replace(
    view,
    status=sealed(status, np.int8),
    role=sealed(role, np.int8),
    ready=frozenset(ready),
  )


def _rejoin(view: ClusterView, action: act.Rejoin) -> ClusterView:
  rank = int(known(view, (action.rank,))[0])
  if view.status[rank] not in (Status.LAUNCHING, Status.SPARE):
    status = Status(view.status[rank]).name
    raise IllegalPlan(f"rank {rank} is {status}, not LAUNCHING or SPARE")
  name = absent(view.launched, [*view.mesh.tolist(), rank])
  view = _with_mesh(view, mesh_named(view.launched, name))
  return dataclasses.replace(view, executable=name, ready=view.ready | {name})


def _restart(view: ClusterView, action: act.RestartInstance) -> ClusterView:
  """A fresh instance: its shapes are made for the ranks it has."""
  if not view.on_disk:
    raise IllegalPlan("a restart needs the checkpoint on disk; there is none")
  epoch, ranks = view.epoch, action.ranks
  # Its processes start in the roles of the first ones.
  view = dataclasses.replace(view, role=view.home)
  view = _rebuild_mesh(view, act.RebuildMesh(ranks))
  name = absent(view.launched, ranks)
  holders = len(expert_ranks(view))
  if not holders:
    raise IllegalPlan(f"none of the {len(ranks)} ranks may hold experts")
  if not len(request_ranks(view)):
    raise IllegalPlan(f"none of the {len(ranks)} ranks may hold requests")
  needed = slots_needed(view.n_experts, holders)
  per_rank = max(needed, view.slots_per_rank)
  copies = max(view.table.entries.shape[1], 1)
  slots = place(view, per_rank, extra=(copies - 1) * view.n_experts)
  # Programs of other shapes are of no use.
  stored = view.cached if needed <= view.slots_per_rank else frozenset()
  return dataclasses.replace(
    view,
    epoch=epoch + 1,
    slots=slots,
    table=routing_table(slots, view.mesh, view.n_experts, copies),
    masked=sealed(np.zeros(view.n_experts), bool),
    ready=frozenset({name}),
    cached=stored | {name} if action.cache else stored,
    executable=name,
    requests=request_effects.all_queued(view.requests),
  )


def _verify(view: ClusterView, action: act.Verify) -> ClusterView:
  reason = servable(view)
  if reason:
    raise IllegalPlan(f"no canary can be served: {reason}")
  return view


Advance = Callable[[ClusterView, Any], ClusterView]
ADVANCE: dict[type[act.Action], Advance] = {
  act.Fence: _fence,
  act.RebuildMesh: _rebuild_mesh,
  act.FetchExecutable: _fetch,
  act.CopyExperts: expert_effects.copy_experts,
  act.RemapExperts: expert_effects.remap_experts,
  act.MaskExperts: expert_effects.mask_experts,
  act.RestoreKV: request_effects.restore_kv,
  act.RecomputePrefix: request_effects.recompute_prefix,
  act.Requeue: request_effects.requeue,
  act.FailRequests: request_effects.fail_requests,
  act.SwitchRole: _switch_role,
  act.LaunchRank: _launch,
  act.Rejoin: _rejoin,
  act.RestartInstance: _restart,
  act.Verify: _verify,
}


def advance(view: ClusterView, action: act.Action) -> ClusterView:
  """The view after `action`; `view` itself is left as it is.

  Raises:
    IllegalPlan: the action can't be done from this view.
  """
  if type(action) not in ADVANCE:
    known_names = ", ".join(sorted(a.__name__ for a in ADVANCE))
    raise IllegalPlan(
      f"unknown action {type(action).__name__}; choices: {known_names}"
    )
  return ADVANCE[type(action)](view, action)


def advance_all(
  view: ClusterView, actions: Iterable[act.Action]
) -> ClusterView:
  """The view after all of `actions`, in the order given."""
  for action in actions:
    view = advance(view, action)
  return view
