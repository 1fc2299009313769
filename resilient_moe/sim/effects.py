"""What is so after an action, on a simulated backend."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from resilient_moe import recovery as rm
from resilient_moe.serving.backend import Outcome, Placed
from resilient_moe.sim import behind
from resilient_moe.sim.timing import Spent
from resilient_moe.sim.tokens import NOBODYS, Held

if TYPE_CHECKING:
  from resilient_moe.sim.backend import SimulatedBackend

_PEERS = (rm.Tier.PEER, rm.Tier.LOCAL)


def needs(
  action: rm.Action, placed: tuple[Placed, ...], view: rm.ClusterView
) -> set[int]:
  """Ranks that must live for an action to be done."""
  if isinstance(action, rm.CopyExperts):
    to = {m.rank for m in action.moves}
    return to | {m.source for m in action.moves if action.tier in _PEERS}
  if isinstance(action, rm.RestoreKV):
    away = {p.from_rank for p in placed if action.tier == rm.Tier.PEER}
    alive = set(np.flatnonzero(view.alive()).tolist())
    return {p.rank for p in placed} | (away & alive)
  if isinstance(action, rm.Verify):
    return set(view.mesh.tolist())
  if isinstance(action, rm.Rejoin):
    return {action.rank, *view.mesh.tolist()}
  if isinstance(action, rm.SwitchRole):
    return {action.rank}
  return set()


def execute(
  b: "SimulatedBackend", action: rm.Action, placed: tuple[Placed, ...],
  spent: Spent,
) -> Outcome:  # fmt: skip
  """Does an action whose time has passed."""
  if isinstance(action, rm.RestoreKV):
    return _restore(b, action, placed)
  if isinstance(action, rm.RecomputePrefix):
    return Outcome(f"{len(placed)} requests")
  before = b.facts
  without = dataclasses.replace(before, requests=rm.no_requests())
  b.facts = rm.advance(without, action)
  nbytes = spent.nbytes
  if isinstance(action, rm.Fence):
    b.drop(action.ranks)
    b.injector.drained(action.ranks)
    return Outcome(f"{len(action.ranks)} fenced")
  if isinstance(action, rm.LaunchRank):
    b.there.add(action.rank)
    seconds = b.timing.launch_s(action.rank, before)
    b.background.launch(action.rank, 0.0 if b.case.by_step else seconds)
    return Outcome("launched", nbytes, str(rm.Tier.HOST))
  if isinstance(action, rm.Rejoin):
    b.injector.returned([action.rank])
    b.copies.remember_rank(action.rank)
    return Outcome(f"{len(b.facts.mesh)} ranks")
  if isinstance(action, rm.CopyExperts):
    return Outcome(f"{nbytes} bytes", nbytes, str(action.tier))
  return Outcome(_detail(action, before), nbytes)


def _detail(action: rm.Action, before: rm.ClusterView) -> str:
  if isinstance(action, rm.FetchExecutable):
    return source(action.absent, before)
  if isinstance(action, rm.MaskExperts):
    return f"{len(action.experts)} experts hidden"
  if isinstance(action, rm.Verify):
    return "canary equal"
  return "done"


def source(name: frozenset[int], view: rm.ClusterView) -> str:
  """Where the programs of a mesh come from."""
  if name in view.ready or view.disaggregated:
    return "warm"
  return "stored" if name in view.cached else "compiled"


def _restore(
  b: "SimulatedBackend", action: rm.RestoreKV, placed: tuple[Placed, ...]
) -> Outcome:
  """Live KV from a rank that still stands, else the committed checkpoint."""
  restored: dict[str, int] = {}
  alive = b.facts.alive()
  for p in placed:
    live = action.tier == rm.Tier.PEER and p.from_rank >= 0
    if live and alive[p.from_rank]:
      held = b.rows.read(p.from_rank, p.from_row, p.request_id, p.live_tokens)
      # What lies there instead is taken, and shows.
      held = held or Held(p.request_id, p.live_tokens, NOBODYS)
    else:
      kept = b.copies.restore(p.request_id)
      if kept is None:
        continue
      held = kept
    b.rows.write(p.rank, p.row, held)
    restored[p.request_id] = held.tokens
  behind.rebase_after(b, placed)
  nbytes = sum(restored.values()) * b.case.model.token_kv_bytes
  detail = f"{len(restored)} of {len(placed)} requests"
  return Outcome(detail, nbytes, str(action.tier), restored)
