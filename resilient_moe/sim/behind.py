"""What a simulated backend does behind traffic, between two steps."""

import dataclasses
from typing import TYPE_CHECKING

from resilient_moe import recovery as rm
from resilient_moe.serving.backend import Placed

if TYPE_CHECKING:
  from resilient_moe.sim.backend import SimulatedBackend


def make_ready(b: "SimulatedBackend") -> None:
  """Tells of a mesh that is ready."""
  made = b.background.take()
  if made is None:
    return
  name, seconds = made
  cached = b.facts.cached
  if b.standing.store_executables:
    cached = cached | {name}
  b.facts = dataclasses.replace(
    b.facts, ready=b.facts.ready | {name}, cached=cached
  )
  b.record("mesh_ready", absent=sorted(name), seconds=seconds)


def wait_ready(b: "SimulatedBackend") -> None:
  """Until every mesh that the policy wants is ready."""
  while not b.background.done:
    make_ready(b)
    if not b.background.done:
      b.clock.step()


def ready_for(b: "SimulatedBackend", action: rm.Action) -> bool:
  """Whether an action of a repair can be done without a long wait."""
  b.clock.catch_up()
  if not b.timing.behind or b.case.by_step:
    return True
  if isinstance(action, rm.CopyExperts):
    return all(b.background.up(m.rank) for m in action.moves)
  if isinstance(action, rm.Rejoin):
    mesh = [*b.facts.mesh.tolist(), action.rank]
    name = rm.absent(b.facts.launched, mesh)
    return b.background.up(action.rank) and _made(b, name)
  if isinstance(action, rm.FetchExecutable):
    return _made(b, action.absent)
  return True


def _made(b: "SimulatedBackend", name: frozenset[int]) -> bool:
  """Whether a mesh is ready; if not, it will be, behind traffic."""
  view = b.facts
  mesh = rm.mesh_named(view.launched, name).tolist()
  if name in view.ready or not b.there.issuperset(mesh):
    return True  # or it is not for this action to wait for
  if view.disaggregated:
    return True  # no program belongs to a mesh
  if not b.background.wants(name):
    b.background.want(view.launched, [name])
  return False


def rebase_after(b: "SimulatedBackend", placed: tuple[Placed, ...]) -> None:
  """New places of requests; who sits on its own mirror gets another."""
  held = b.copies.records()
  for p in placed:
    b.seats.moved(p)
    if held.get(p.request_id, (0, p.rank))[1] == p.rank:
      b.rebase.append(p.request_id)


def rebase_one(b: "SimulatedBackend") -> None:
  """Stores one request's KV anew with a holder that lives."""
  if b.copies.mode == "none" or not b.rebase:
    return
  name = b.rebase.pop(0)
  seat = b.seats.get(name)
  if seat is None or seat.rank not in b.copies.ring or not seat.tokens:
    return
  held = b.rows.read(seat.rank, seat.row, name, seat.tokens)
  if held is not None and not b.copies.rebase(held, seat.rank):
    b.rebase.append(name)
