"""Where lost experts come from: the nearest tier, a replica, or nowhere yet."""

from collections.abc import Sequence

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.budget import check_copies, copies_of
from resilient_moe.recovery.checks import expert_ranks
from resilient_moe.recovery.choices import Actions, Experts
from resilient_moe.recovery.placement import extra_copies
from resilient_moe.recovery.policy import Infeasible
from resilient_moe.recovery.rescue import (
  assign,
  copies_from,
  lost_experts,
  replicate,
  retable,
  serve_again,
  serving_slots,
)
from resilient_moe.recovery.view import ClusterView, Role


def nearest(host_weights: bool = True) -> Experts:
  """Lost experts are copied from the nearest tier before service goes on.

  `host_weights` keeps all experts in host memory too; without it they come
  from disk.
  """
  return Experts(
    extra=lambda view: 0, resume=_copy_lost, host_weights=host_weights
  )


def replicas(
  count: int | str = "all",
  shadows: bool = False,
  load: Sequence[float] | np.ndarray | None = None,
  host_weights: bool = True,
  copy_lost: bool = True,
) -> Experts:
  """A second copy of `count` experts on other ranks, the most loaded first.

  `count` may be a memory budget for all of them together ("1.5GB", or "25%"
  of the experts' bytes): as many as fit. Slots kept for losses come on top.
  `load` [E]: tokens an expert gets, in any unit.

  They serve (or, as `shadows`, hold weights only) and are promoted by a table
  change; what has none is copied from the nearest tier, or not at all without
  `copy_lost`: then this is infeasible. Redundancy is restored behind traffic,
  into empty slots.
  """
  check_copies(count)
  load = None if load is None else np.asarray(load, np.float64)

  def extra(view: ClusterView) -> int:
    if load is not None and load.shape != (view.n_experts,):
      raise ValueError(
        f"load of shape {load.shape} for {view.n_experts} experts; one each"
      )
    return copies_of(count, view)

  def repair(view: ClusterView) -> Actions:
    wanted = np.sort(extra_copies(view.n_experts, extra(view), load))
    if shadows:
      copies = copies_from(view, replicate(view, wanted))
      return () if isinstance(copies, str) else copies
    moves, promoted = serve_again(view, wanted)
    copies = copies_from(view, moves)
    if isinstance(copies, str) or not moves + promoted:
      return ()
    return (*copies, act.RemapExperts(retable(view, moves + promoted)))

  def resume(view: ClusterView) -> Actions | Infeasible:
    lost = len(lost_experts(view))
    if lost and not copy_lost:
      return Infeasible(f"{lost} experts have lost their last copy")
    return _copy_lost(view)

  return Experts(
    extra=extra,
    resume=resume,
    repair=repair,
    copies=1 if shadows else 2,
    load=load,
    host_weights=host_weights,
  )


def mask(
  min_live: int = 0, host_weights: bool = True, min_ranks: int = 0
) -> Experts:
  """Lost experts are hidden at once, and copied back behind traffic.

  Needs at least `min_live` experts left (never fewer than a token needs), of
  an instance launched with at least `min_ranks` expert ranks.
  """

  def resume(view: ClusterView) -> Actions | Infeasible:
    launched = np.array(view.launched, np.int64)
    ranks = int((view.home[launched] != Role.ATTENTION).sum())
    if ranks < min_ranks:
      return Infeasible(f"{ranks} expert ranks; masking needs {min_ranks}")
    lost = lost_experts(view)
    readable = np.isin(lost, view.slots[view.alive()])  # with who leaves
    hidden = lost[~readable]
    live, need = view.n_experts - len(hidden), max(min_live, view.top_k)
    if live < need:
      return Infeasible(f"{live} experts are left, {need} are needed")
    drained = _copy_lost(view, lost[readable])
    new = hidden[~view.masked[hidden]].tolist()
    if isinstance(drained, Infeasible) or not new:
      return drained
    # What an abandoned repair had brought back is unmasked first: it counts.
    return (*drained, act.MaskExperts(tuple(new)))

  def repair(view: ClusterView) -> Actions:
    # Shadows that growth has left make room, too.
    room = int((~serving_slots(view)[expert_ranks(view)]).sum())
    behind = _copy_lost(view, lost_experts(view)[:room])
    return () if isinstance(behind, Infeasible) else behind

  return Experts(
    extra=lambda view: 0,
    resume=resume,
    repair=repair,
    host_weights=host_weights,
    lossless=False,
  )


def _copy_lost(
  view: ClusterView, lost: np.ndarray | None = None
) -> Actions | Infeasible:
  """Copies of `lost` (default: all lost) and the table that serves them."""
  moves = assign(view, lost_experts(view) if lost is None else lost)
  if isinstance(moves, str):
    return Infeasible(moves)
  if not moves and (view.table.copies() > 0).all():
    return ()  # everything is served
  copies = copies_from(view, moves)
  if isinstance(copies, str):
    return Infeasible(copies)
  table = retable(view, moves)
  if not moves and np.array_equal(table.entries, view.table.entries):
    return ()  # what isn't served is masked
  return (*copies, act.RemapExperts(table))
