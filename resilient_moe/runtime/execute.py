"""What executing each action means: facts, and calls to a backend's hands.

One function an action, found by its type; the tests run over `ACTIONS`. What
is so afterwards is written here once for all runtimes; `Hands` are what a
runtime does in its own way.
"""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from resilient_moe.faults import Injector
from resilient_moe.mesh.executables import Source
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.model.step import batch_width
from resilient_moe.recovery import absent, mesh_named
from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.view import Role, Tier
from resilient_moe.runtime.facts import Facts
from resilient_moe.serving.backend import Outcome, Placed

Places = tuple[Placed, ...]
Mesh = tuple[int, ...]


class Hands(Protocol):
  """What the actions ask of a runtime."""

  facts: Facts
  injector: Injector
  canary_token: int

  @property
  def shape(self) -> InstanceShape:
    """What every program of the instance is compiled for."""

  def drop(self, ranks: Iterable[int]) -> None:
    """Ends whatever of these ranks is still there; nothing is read again."""

  def load(self, mesh: Mesh, run: bool) -> Source:
    """Gets a mesh's step programs; `run`: also runs each once, idle."""

  def copy(
    self, moves: tuple[act.Move, ...], tier: Tier, slots: np.ndarray
  ) -> int:
    """Weights into slots, waited for; bytes. `slots` [N, S]: who has what."""

  def restore(self, placed: Places, tier: Tier) -> tuple[dict[str, int], int]:
    """KV into the requests' new rows: request -> positions; bytes."""

  def launch(self, rank: int) -> int:
    """Starts a replacement with everything but experts; bytes."""

  def joined(self, rank: int) -> None:
    """A launched rank serves from here on."""

  def rebase_after(self, placed: Places) -> None:
    """Requests have new places: their KV checkpoints begin anew."""

  def switch(self, rank: int, role: Role) -> None:
    """The rank gets what its new role needs."""

  def probe(self, ints: np.ndarray) -> np.ndarray:
    """A wide step on the present mesh without a commit: tokens [R, B + 1]."""


def _fence(b: Hands, action: act.Fence, _: Places) -> Outcome:
  gone = set(action.ranks)
  b.drop(gone)
  b.injector.drained(gone)
  b.facts.lost(gone)
  b.facts.next_epoch()
  return Outcome(f"{len(gone)} fenced")


def _rebuild(b: Hands, action: act.RebuildMesh, _: Places) -> Outcome:
  b.facts.meshed(action.ranks)
  return Outcome(f"{len(action.ranks)} ranks")


def _fetch(b: Hands, action: act.FetchExecutable, _: Places) -> Outcome:
  view = b.facts.view
  current = action.absent == absent(view.launched, view.mesh)
  mesh = _mesh_of(b, action.absent)
  # A mesh for a later loss is made ready, unless that was done on the way.
  run = not current and action.absent not in view.ready
  source = b.load(mesh, run)
  b.facts.ready(action.absent, current)
  return Outcome(str(source))


def _mesh_of(b: Hands, name: frozenset[int]) -> Mesh:
  return tuple(int(r) for r in mesh_named(b.facts.view.launched, name))


def _copy(b: Hands, action: act.CopyExperts, _: Places) -> Outcome:
  """Reads from the tier, writes into slots, and waits for the bytes."""
  slots = b.facts.view.slots
  for move in action.moves:
    # A copy that is abandoned half-way leaves a slot that nobody trusts.
    b.facts.filled(move.rank, move.slot, -1)
  start = time.monotonic()
  nbytes = b.copy(action.moves, action.tier, slots)
  for move in action.moves:
    b.facts.filled(move.rank, move.slot, move.expert)
  rate = nbytes / max(time.monotonic() - start, 1e-9)
  return Outcome(f"{rate / 1e9:.2f} GB/s", nbytes, str(action.tier))


def _remap(b: Hands, action: act.RemapExperts, _: Places) -> Outcome:
  b.facts.routed(action.table)
  return Outcome("routed")


def _mask(b: Hands, action: act.MaskExperts, _: Places) -> Outcome:
  b.facts.hidden(action.experts)
  return Outcome(f"{len(action.experts)} experts hidden")


def _restore(b: Hands, action: act.RestoreKV, placed: Places) -> Outcome:
  """Live KV from a rank that still stands, else the committed checkpoint."""
  restored, nbytes = b.restore(placed, action.tier)
  b.rebase_after(placed)
  detail = f"{len(restored)} of {len(placed)} requests"
  return Outcome(detail, nbytes, str(action.tier), restored)


def _recompute(b: Hands, _: act.RecomputePrefix, placed: Places) -> Outcome:
  return Outcome(f"{len(placed)} requests")


def _switch(b: Hands, action: act.SwitchRole, _: Places) -> Outcome:
  b.switch(action.rank, action.role)
  b.facts.role(action.rank, action.role)
  return Outcome(action.role.name.lower())


def _launch(b: Hands, action: act.LaunchRank, _: Places) -> Outcome:
  """A replacement with everything but experts."""
  nbytes = b.launch(action.rank)
  b.facts.launching(action.rank)
  return Outcome("launched", nbytes, str(Tier.HOST))


def _rejoin(b: Hands, action: act.Rejoin, _: Places) -> Outcome:
  """The launched rank takes its place; its programs have run before."""
  view = b.facts.view
  name = absent(view.launched, [*view.mesh.tolist(), action.rank])
  mesh = _mesh_of(b, name)
  if name not in view.ready:
    b.load(mesh, run=True)
  b.facts.meshed(mesh)
  b.facts.ready(name, True)
  b.injector.returned([action.rank])
  b.joined(action.rank)
  return Outcome(f"{len(mesh)} ranks")


CANARY = (0, 84, 104, 101)  # tokens of the canary prompt, cut to the vocabulary


def canary(b: Hands) -> int:
  """What the present mesh says after the canary prompt; nothing is kept.

  A step reads and returns a delta, so a step without a commit is a probe.
  """
  shape = b.shape
  rows, width = shape.options.rows, shape.options.chunk
  prompt = [t % shape.config.vocab_size for t in CANARY][:width]
  n = len(request_ranks(b.facts.view))
  ints = np.zeros((n, batch_width(shape.options, width)), np.int32)
  ints[:, rows : 2 * rows] = -1
  ints[:, 4 * rows + 1] = len(prompt)
  ints[:, 4 * rows + 5 : 4 * rows + 5 + len(prompt)] = prompt
  said = set(b.probe(ints)[:, -1].tolist())
  if len(said) != 1:
    raise RuntimeError(f"the canary got different tokens on ranks: {said}")
  return said.pop()


def _verify(b: Hands, action: act.Verify, _: Places) -> Outcome:
  said = canary(b)
  if said != b.canary_token:
    raise RuntimeError(
      f"canary {action.probe!r}: token {said}, expected {b.canary_token}"
    )
  return Outcome("canary equal")


def _unplaced(b: Hands, action: act.Action, _: Places) -> Outcome:
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
