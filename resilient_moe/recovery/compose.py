"""`compose` makes a policy of one choice on each of three axes (`axes.py`).

An axis sees views only. The ranks axis chooses the mesh; the other two plan
from the view that has it, got by `advance`, so that what they say fits
whatever came before: also the middle of an abandoned recovery.
"""

from collections.abc import Sequence

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import expert_ranks
from resilient_moe.recovery.choices import (
  Actions,
  Experts,
  Ranks,
  Requests,
)
from resilient_moe.recovery.failures import (
  Failure,
  LinkLost,
  RanksLost,
  Straggler,
)
from resilient_moe.recovery.growth import next_meshes, regrow
from resilient_moe.recovery.links import needed
from resilient_moe.recovery.packing import routing_table
from resilient_moe.recovery.placement import place
from resilient_moe.recovery.plan import Plan
from resilient_moe.recovery.policy import (
  DEPLOYMENTS,
  Infeasible,
  RecoveryPolicy,
  Standing,
  misplaced,
)
from resilient_moe.recovery.semantics import advance_all, lose
from resilient_moe.recovery.view import (
  ClusterView,
  Role,
  Status,
  absent,
)


def compose(
  name: str,
  ranks: Ranks,
  experts: Experts,
  requests: Requests,
  *,
  drain_stragglers: bool = False,
  rearm: bool = False,
  deployments: tuple[str, ...] = DEPLOYMENTS,
) -> RecoveryPolicy:
  """A policy from one choice on each axis.

  `drain_stragglers` treats a slow rank like one that leaves. `rearm` makes
  the meshes of the next single losses ready behind traffic. `deployments`:
  where it is meant to be used, of those that the ranks axis can.
  """
  where = tuple(d for d in deployments if d in ranks.deployments)

  def prepare(view: ClusterView) -> Standing:
    reason = misplaced(name, where, view)
    if reason:
      raise ValueError(reason)
    return _standing(view, ranks, experts, requests)

  def recover(view: ClusterView, failure: Failure) -> Plan | Infeasible:
    reason = misplaced(name, where, view)
    if reason:
      return Infeasible(reason)
    if isinstance(failure, Straggler) and not drain_stragglers:
      return Infeasible(
        f"stragglers are tolerated: rank {failure.rank} is "
        f"{failure.slowdown:.1f} times slower"
      )
    if isinstance(failure, LinkLost):
      _ranks_of(view, failure)
      if not needed(view, failure):
        return Infeasible(
          f"no need: all experts of rank {failure.expert} have another copy "
          f"that rank {failure.attention} can reach"
        )
      # A rank that not all can reach is of no use. If it can't be spared, the
      # one that doesn't reach it goes.
      expert = RanksLost((failure.expert,))
      plan = _recover(view, expert, ranks, experts, requests)
      failure = RanksLost((failure.attention,))
      if isinstance(plan, Plan):
        return _rearmed(view, plan, ranks, rearm)
    plan = _recover(view, failure, ranks, experts, requests)
    if isinstance(plan, Infeasible):
      return plan
    return _rearmed(view, plan, ranks, rearm)

  return RecoveryPolicy(
    name=name,
    prepare=prepare,
    recover=recover,
    lossless=experts.lossless,
    fails_requests=requests.fails_requests,
    spares=ranks.spares,
    deployments=where,
  )


def _rearmed(
  view: ClusterView, plan: Plan, ranks: Ranks, rearm: bool
) -> Plan:
  """The plan, and behind it the meshes of the next single losses."""
  if not rearm or ranks.restart:
    return plan
  after = advance_all(view, plan.resume + plan.repair)
  made = next_meshes(after, ranks.spares > 0)
  return Plan(plan.resume, plan.repair + made, plan.paused)


def _standing(
  view: ClusterView, ranks: Ranks, experts: Experts, requests: Requests
) -> Standing:
  reserve, n = ranks.reserve(view), view.n_experts
  holders = len(expert_ranks(view))
  attending = int((view.role[view.mesh] != Role.EXPERT).sum())
  extra = experts.extra(view)
  left = max(holders - reserve.lost_expert_ranks, 1)
  slots = -(-(n + extra) // left)
  rows_left = max(attending - reserve.lost_request_ranks, 1)
  rows = -(-view.rows_per_rank * attending // rows_left)
  held = place(view, slots, extra, experts.load)
  # Shadows are held, not served: the table is that of the first copies.
  served = held if experts.copies > 1 else place(view, slots)
  return Standing(
    slots=held,
    table=routing_table(served, view.mesh, n, experts.copies),
    rows_per_rank=rows,
    ready=reserve.ready,
    checkpoint=requests.checkpoint,
    host_weights=experts.host_weights,
    store_executables=ranks.cache,
  )


def _ranks_of(view: ClusterView, failure: Failure) -> tuple[int, ...]:
  named = failure.rank if isinstance(failure, Straggler) else failure.ranks
  ranks = (named,) if isinstance(named, int) else tuple(named)
  for rank in ranks:
    if not 0 <= rank < len(view.status):
      raise ValueError(
        f"the failure names rank {rank}; known: 0..{len(view.status) - 1}"
      )
  return tuple(sorted(set(ranks)))


def _recover(
  view: ClusterView,
  failure: Failure,
  ranks: Ranks,
  experts: Experts,
  requests: Requests,
) -> Plan | Infeasible:
  named = _ranks_of(view, failure)
  dead = named if isinstance(failure, RanksLost) else ()
  left = lose(view, dead)
  leaving = () if dead else tuple(r for r in named if left.alive()[r])
  switch = ranks.switch(left, leaving)
  left = advance_all(left, switch)
  mesh = ranks.mesh(left, leaving)
  if isinstance(mesh, Infeasible):
    return mesh
  members = view.mesh[left.status[view.mesh] == Status.LOST].tolist()
  fence = tuple(sorted({*dead, *members}))
  fencing: Actions = (act.Fence(fence),) if fence else ()
  if ranks.restart:
    return _restart_plan(view, fencing, leaving, mesh, ranks.cache)
  meshing = fencing + switch + _meshing(left, mesh)
  after = advance_all(view, meshing)
  weights = experts.resume(after)
  if isinstance(weights, Infeasible):
    return weights
  moved = requests.plan(after)
  resume = _resume(meshing, weights, moved, leaving)
  repair: Actions = (act.Fence(leaving),) if leaving else ()
  repair += experts.repair(advance_all(after, weights + moved + repair))
  if ranks.replace:
    repair += regrow(advance_all(view, resume + repair), experts.repair)
  return Plan(resume, repair, _paused(left, resume, moved))


def _resume(
  meshing: Actions, weights: Actions, moved: Actions, leaving: Sequence[int]
) -> Actions:
  """All of `resume`; while ranks that leave serve on, copies come first."""
  if not leaving:
    return meshing + weights + moved
  early = tuple(a for a in weights if isinstance(a, act.CopyExperts))
  late = tuple(a for a in weights if not isinstance(a, act.CopyExperts))
  return early + meshing + late + moved


def _meshing(left: ClusterView, mesh: np.ndarray) -> Actions:
  """The actions that make `mesh` serve, if it doesn't already."""
  name = absent(left.launched, mesh)
  same = np.array_equal(mesh, left.mesh)
  if left.disaggregated:  # programs belong to ranks, not to meshes
    return () if same else (act.RebuildMesh(tuple(mesh.tolist())),)
  if same and left.executable == name:
    return ()
  fetch = act.FetchExecutable(name)
  return (fetch,) if same else (act.RebuildMesh(tuple(mesh.tolist())), fetch)


def _paused(
  left: ClusterView, resume: Actions, moved: Actions
) -> tuple[str, ...]:
  """Who waits for `resume`: those who move; all if nobody can step.

  A collocated mesh steps as one: while it changes, nobody's token comes.
  Where roles are apart, experts that nobody holds stop all until they are
  copied; what a leaving rank still serves stops nobody.
  """
  table = left.requests
  stops = any(not isinstance(action, act.Fence) for action in resume)
  if left.disaggregated:
    copies = (a for a in resume if isinstance(a, act.CopyExperts))
    copied = [move.expert for action in copies for move in action.moves]
    held = np.isin(copied, left.slots[left.status == Status.SERVING])
    stops = not held.all()
  if stops:
    pairs = zip(table.request_id, (table.rank >= 0).tolist(), strict=True)
    return tuple(name for name, running in pairs if running)
  names = {n for a in moved for n in getattr(a, "requests", ())}
  return tuple(n for n in table.request_id if n in names)


def _restart_plan(
  view: ClusterView,
  fencing: Actions,
  leaving: Sequence[int],
  mesh: np.ndarray,
  cache: bool,
) -> Plan:
  if leaving:  # its process ends with the others
    fencing = (act.Fence(tuple(sorted({*leaving, *_fenced(fencing)}))),)
  ranks = tuple(mesh.tolist())
  everyone = view.requests.request_id
  return Plan((*fencing, act.RestartInstance(ranks, cache)), (), everyone)


def _fenced(actions: Actions) -> set[int]:
  fences = (a for a in actions if isinstance(a, act.Fence))
  return {r for a in fences for r in a.ranks}
