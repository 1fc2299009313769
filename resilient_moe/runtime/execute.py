"""What executing each action means on the emulated runtime.

One function an action, found by its type; the tests run over `ACTIONS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from resilient_moe.mesh.executables import Source
from resilient_moe.model.step import batch_width
from resilient_moe.recovery import absent, mesh_named
from resilient_moe.recovery import actions as act
from resilient_moe.recovery.view import Tier
from resilient_moe.runtime.weights import tree_bytes
from resilient_moe.serving.backend import Outcome, Placed

if TYPE_CHECKING:
  from resilient_moe.runtime.emulated import EmulatedBackend

Places = tuple[Placed, ...]


def _fence(b: EmulatedBackend, action: act.Fence, _: Places) -> Outcome:
  gone = set(action.ranks)
  drained = [r for r in gone if b.store.holds(r)]
  for rank in drained:
    b.store.lose(rank)
    b.readiness.drop_rank(rank)
    if b.checkpointer is not None:
      b.checkpointer.forget_rank(rank)
  b.injector.drained(gone)
  b.facts.lost(gone)
  b.facts.next_epoch()
  return Outcome(f"{len(gone)} fenced")


def _rebuild(b: EmulatedBackend, action: act.RebuildMesh, _: Places) -> Outcome:
  b.facts.meshed(action.ranks)
  return Outcome(f"{len(action.ranks)} ranks")


def _fetch(
  b: EmulatedBackend, action: act.FetchExecutable, _: Places
) -> Outcome:
  view = b.facts.view
  mesh = tuple(int(r) for r in mesh_named(view.launched, action.absent))
  current = action.absent == absent(view.launched, view.mesh)
  sources = set()
  for width in b.store.shape.chunks():
    sources.add(b.store.program(mesh, width)[1])
    if not current:  # made ready for a later loss
      b.run_once(mesh, width)
  b.facts.ready(action.absent, current)
  worst = max(sources, key=list(Source).index)
  return Outcome(str(worst))


def _copy(b: EmulatedBackend, action: act.CopyExperts, _: Places) -> Outcome:
  """Reads from the tier, writes into slots, and waits for the bytes."""
  slots = b.facts.view.slots

  def peer(rank: int, expert: int) -> dict[str, Any]:
    slot = int(np.flatnonzero(slots[rank] == expert)[0])
    return b.store.read_slot(rank, slot)

  start = time.monotonic()
  weights = b.weights.read(action.moves, action.tier, peer)
  nbytes = 0
  for move in action.moves:
    b.store.write_slot(move.rank, move.slot, weights[move.expert])
    b.facts.filled(move.rank, move.slot, move.expert)
    nbytes += tree_bytes(weights[move.expert])
  b.store.wait()
  rate = nbytes / max(time.monotonic() - start, 1e-9)
  return Outcome(f"{rate / 1e9:.2f} GB/s", nbytes, str(action.tier))


def _remap(b: EmulatedBackend, action: act.RemapExperts, _: Places) -> Outcome:
  b.facts.routed(action.table)
  return Outcome("routed")


def _mask(b: EmulatedBackend, action: act.MaskExperts, _: Places) -> Outcome:
  b.facts.hidden(action.experts)
  return Outcome(f"{len(action.experts)} experts hidden")


def _restore(
  b: EmulatedBackend, action: act.RestoreKV, placed: Places
) -> Outcome:
  """Live KV from a rank that still stands, else the committed checkpoint."""
  restored, nbytes = {}, 0
  alive = b.facts.view.alive()
  for p in placed:
    kv = None
    if action.tier == Tier.PEER and p.from_rank >= 0 and alive[p.from_rank]:
      kv = b.store.read_row(p.from_rank, p.from_row, p.live_tokens)
    elif b.checkpointer is not None:
      kv = b.checkpointer.restore(p.request_id)
    if kv is None:
      continue
    b.store.write_row(p.rank, p.row, kv)
    restored[p.request_id] = kv.shape[2]
    nbytes += kv.nbytes
  b.store.wait()
  b.rebase_after(placed)
  detail = f"{len(restored)} of {len(placed)} requests"
  return Outcome(detail, nbytes, str(action.tier), restored)


def _recompute(
  b: EmulatedBackend, _: act.RecomputePrefix, placed: Places
) -> Outcome:
  return Outcome(f"{len(placed)} requests")


def _switch(b: EmulatedBackend, action: act.SwitchRole, _: Places) -> Outcome:
  b.facts.role(action.rank, action.role)
  return Outcome(action.role.name.lower())


def _launch(b: EmulatedBackend, action: act.LaunchRank, _: Places) -> Outcome:
  """A replacement device with everything but experts."""
  slots = [None] * b.facts.view.slots_per_rank
  b.store.add(action.rank, b.weights.dense, slots)
  b.facts.launching(action.rank)
  return Outcome("launched", tree_bytes(b.weights.dense), str(Tier.HOST))


def _rejoin(b: EmulatedBackend, action: act.Rejoin, _: Places) -> Outcome:
  """The launched rank takes its place; its programs are fetched first."""
  view = b.facts.view
  name = absent(view.launched, [*view.mesh.tolist(), action.rank])
  mesh = tuple(int(r) for r in mesh_named(view.launched, name))
  for width in b.store.shape.chunks():
    b.store.make_ready(mesh, width, b.routing_of(np.array(mesh)))
  b.facts.meshed(mesh)
  b.facts.ready(name, True)
  b.injector.returned([action.rank])
  if b.checkpointer is not None:
    b.checkpointer.remember_rank(action.rank)
  return Outcome(f"{len(mesh)} ranks")


CANARY = (0, 84, 104, 101)  # tokens of the canary prompt, cut to the vocabulary


def canary(b: EmulatedBackend) -> int:
  """What the present mesh says after the canary prompt; nothing is kept.

  A step reads and returns a delta, so a step without a commit is a probe.
  """
  shape = b.store.shape
  rows, width = shape.options.rows, shape.options.chunk
  mesh = b.facts.mesh
  prompt = [t % shape.config.vocab_size for t in CANARY][:width]
  ints = np.zeros((len(mesh), batch_width(shape.options, width)), np.int32)
  ints[:, rows : 2 * rows] = -1
  ints[:, 4 * rows + 1] = len(prompt)
  ints[:, 4 * rows + 5 : 4 * rows + 5 + len(prompt)] = prompt
  _, tokens, _ = b.store.run(mesh, width, b.routing(), ints)
  said = set(tokens[:, -1].tolist())
  if len(said) != 1:
    raise RuntimeError(f"the canary got different tokens on ranks: {said}")
  return said.pop()


def _verify(b: EmulatedBackend, action: act.Verify, _: Places) -> Outcome:
  said = canary(b)
  if said != b.canary_token:
    raise RuntimeError(
      f"canary {action.probe!r}: token {said}, expected {b.canary_token}"
    )
  return Outcome("canary equal")


def _unplaced(b: EmulatedBackend, action: act.Action, _: Places) -> Outcome:
  raise ValueError(
    f"{type(action).__name__} is carried out by the serve loop or the gateway"
  )


Execute = Callable[..., Outcome]
EXECUTE: dict[type[act.Action], Execute] = {
  act.Fence: _fence,
  act.RebuildMesh: _rebuild,
  act.FetchExecutable: _fetch,
  act.CopyExperts: _copy,
  act.RemapExperts: _remap,
  act.MaskExperts: _mask,
  act.RestoreKV: _restore,
  act.RecomputePrefix: _recompute,
  act.Requeue: _unplaced,
  act.FailRequests: _unplaced,
  act.SwitchRole: _switch,
  act.LaunchRank: _launch,
  act.Rejoin: _rejoin,
  act.RestartInstance: _unplaced,
  act.Verify: _verify,
}
assert set(EXECUTE) == set(act.ACTIONS)
