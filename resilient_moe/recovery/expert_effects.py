"""What the actions on experts do to a view: slots, table, mask."""

import dataclasses

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import IllegalPlan, table_fault
from resilient_moe.recovery.effects import known, sealed, without
from resilient_moe.recovery.view import (
  ClusterView,
  RoutingTable,
  Status,
  Tier,
)


def copy_experts(view: ClusterView, action: act.CopyExperts) -> ClusterView:
  """Fills slots; a slot that served is taken out of the table first."""
  if not action.moves:
    return view
  _check_moves(view, action)
  rank = np.array([m.rank for m in action.moves])
  slot = np.array([m.slot for m in action.moves])
  slots = view.slots.copy()
  slots[rank, slot] = [m.expert for m in action.moves]
  written = np.zeros(slots.shape, bool)
  written[rank, slot] = True
  return dataclasses.replace(
    view,
    slots=sealed(slots, np.int32),
    table=without(view.table, written),
  )


def _check_moves(view: ClusterView, action: act.CopyExperts) -> None:
  """Raises IllegalPlan if a move can't be done from this view."""
  n, per_rank = view.slots.shape
  may_hold = view.alive() | (view.status == Status.LAUNCHING)
  for move in action.moves:
    known(view, (move.rank,))
    if not 0 <= move.expert < view.n_experts:
      raise IllegalPlan(
        f"expert {move.expert} is outside 0..{view.n_experts - 1}"
      )
    if not 0 <= move.slot < per_rank:
      raise IllegalPlan(f"slot {move.slot} is outside 0..{per_rank - 1}")
    if not may_hold[move.rank]:
      status = Status(view.status[move.rank]).name
      raise IllegalPlan(f"rank {move.rank} is {status}; it can hold nothing")
    _check_source(view, action.tier, move)
  places = {(m.rank, m.slot) for m in action.moves}
  if len(places) < len(action.moves):
    raise IllegalPlan(
      f"{len(action.moves)} moves fill only {len(places)} different slots"
    )


def _check_source(view: ClusterView, tier: Tier, move: act.Move) -> None:
  if tier in (Tier.PEER, Tier.LOCAL):
    source = move.rank if tier == Tier.LOCAL else move.source
    known(view, (source,))
    if not view.alive()[source]:
      status = Status(view.status[source]).name
      raise IllegalPlan(f"source rank {source} is {status}; it can't be read")
    if move.expert not in view.slots[source]:
      raise IllegalPlan(f"source rank {source} holds no expert {move.expert}")
  if tier == Tier.HOST and not view.in_host_memory[move.expert]:
    raise IllegalPlan(f"expert {move.expert} is in no host's memory")
  if tier == Tier.DISK and not view.on_disk:
    raise IllegalPlan(f"no checkpoint on disk to read {move.expert} from")


def remap_experts(view: ClusterView, action: act.RemapExperts) -> ClusterView:
  """Swaps the table and unmasks what it serves."""
  entries = np.asarray(action.table.entries)
  if entries.shape != view.table.entries.shape:
    raise IllegalPlan(
      f"table of shape {entries.shape}, not {view.table.entries.shape}: "
      "shapes are fixed for an instance"
    )
  reason = table_fault(view, entries)
  if reason:
    raise IllegalPlan(reason)
  table = RoutingTable(sealed(entries, np.int32))
  masked = sealed(view.masked & (table.copies() == 0), bool)
  return dataclasses.replace(view, table=table, masked=masked)


def mask_experts(view: ClusterView, action: act.MaskExperts) -> ClusterView:
  """Hides experts and takes them out of the table."""
  for expert in action.experts:
    if not 0 <= expert < view.n_experts:
      raise IllegalPlan(f"expert {expert} is outside 0..{view.n_experts - 1}")
  masked = view.masked.copy()
  masked[list(action.experts)] = True
  live = int((~masked).sum())
  if live < view.top_k:
    raise IllegalPlan(f"{live} experts are left; a token needs {view.top_k}")
  entries = view.table.entries.copy()
  entries[masked] = -1
  return dataclasses.replace(
    view,
    masked=sealed(masked, bool),
    table=RoutingTable(sealed(entries, np.int32)),
  )
