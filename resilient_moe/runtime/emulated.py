"""The emulated runtime: N devices in one process, whose arrays can be lost.

A loss strikes in the middle of a step: the step's results are dropped, the
rank's arrays are deleted, and whatever would use them is an error. There is
no detection to measure; everything else is done on real arrays.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from resilient_moe.faults import Fault, Injector
from resilient_moe.mesh.executables import Source
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.recovery import (
  Failure,
  RanksLeaving,
  RanksLost,
  Standing,
  Straggler,
)
from resilient_moe.recovery.actions import Move
from resilient_moe.recovery.reserve import Memory
from resilient_moe.recovery.view import ClusterView, Tier
from resilient_moe.runtime.device_store import DeviceStore
from resilient_moe.runtime.execute import Mesh
from resilient_moe.runtime.instance import Instance, packed
from resilient_moe.runtime.kv_checkpoint import KVCheckpointer
from resilient_moe.runtime.logical_store import LogicalStore
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.runtime.weights import WeightTiers, tree_bytes
from resilient_moe.serving.backend import Placed, StepAborted
from resilient_moe.serving.carry import Record
from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.serving.seats import Seats


class EmulatedBackend(Instance):
  """Ranks on devices of one process (`serving.backend.Backend`)."""

  def __init__(
    self,
    view: ClusterView,
    standing: Standing,
    store: DeviceStore | LogicalStore,
    weights: WeightTiers,
    checkpointer: KVCheckpointer | None,
    readiness: Readiness,
    injector: Injector,
    record: Record,
    now_s: Callable[[], float],
  ) -> None:
    super().__init__(view, standing, readiness, injector, record, now_s)
    self.store = store
    self.weights = weights
    self.checkpointer = checkpointer
    self.seats = Seats()
    self._rebase: collections.deque[str] = collections.deque()
    self._routing: Any = None
    if checkpointer is not None:
      checkpointer.ring = self.facts.mesh
    self.announce()

  @property
  def shape(self) -> InstanceShape:
    return self.store.shape

  # -- the three duties

  def step(self, batch: StepBatch) -> np.ndarray:
    mesh = self.facts.mesh
    self.seats.note(batch, committed=False)
    delta, tokens, ints = self.store.run(
      mesh, batch.width, self.routing(), packed(batch)
    )
    settled = self.readiness.done and not self.repairing
    if self._strike(self.due_in_step(batch, settled)):
      raise StepAborted
    # Only now: a commit on top of a step that fails would lose the cache.
    self.store.commit(mesh, batch.width, delta, ints)
    self.seats.note(batch, committed=True)
    if self.checkpointer is not None:
      rows = self.store.shape.options.rows
      self.checkpointer.stream(batch, delta, rows)
    return tokens

  def poll(
    self, recovery_actions: int | None = None, repairing: bool = False
  ) -> tuple[Failure, ...]:
    if recovery_actions is not None:
      ready = self.readiness.done
      self._strike(self.due_in_recovery(recovery_actions, ready))
    else:
      self.repairing = repairing
      if not self.pending:
        self.make_ready()
        self._rebase_one()
    return self.take_pending()

  def checkpoints(self) -> Mapping[str, tuple[int, int]]:
    if self.checkpointer is None:
      return {}
    self.checkpointer.drain()
    return self.checkpointer.records()

  # -- what the actions use (`execute.Hands`)

  def drop(self, ranks: Iterable[int]) -> None:
    for rank in ranks:
      if self.store.holds(rank):
        self.store.lose(rank)
        self.readiness.drop_rank(rank)
        if self.checkpointer is not None:
          self.checkpointer.forget_rank(rank)

  def load(self, mesh: Mesh, run: bool) -> Source:
    sources = []
    for width in self.shape.chunks():
      sources.append(self.store.program(mesh, width)[1])
      if run:
        self.run_once(mesh, width)
    return max(sources, key=list(Source).index)

  def copy(
    self, moves: tuple[Move, ...], tier: Tier, slots: np.ndarray
  ) -> int:
    def peer(rank: int, expert: int) -> dict[str, Any]:
      slot = int(np.flatnonzero(slots[rank] == expert)[0])
      return self.store.read_slot(rank, slot)

    weights = self.weights.read(moves, tier, peer)
    for move in moves:
      self.write_slot(move, weights[move.expert])
    self.store.wait()
    return sum(tree_bytes(weights[move.expert]) for move in moves)

  def write_slot(self, move: Move, weights: dict[str, Any]) -> None:
    self.store.write_slot(move.rank, move.slot, weights)

  def restore(
    self, placed: tuple[Placed, ...], tier: Tier
  ) -> tuple[dict[str, int], int]:
    restored, nbytes = {}, 0
    alive = self.facts.view.alive()
    for p in placed:
      kv = None
      if tier == Tier.PEER and p.from_rank >= 0 and alive[p.from_rank]:
        kv = self.store.read_row(p.from_rank, p.from_row, p.live_tokens)
      elif self.checkpointer is not None:
        kv = self.checkpointer.restore(p.request_id)
      if kv is None:
        continue
      self.store.write_row(p.rank, p.row, kv)
      restored[p.request_id] = kv.shape[2]
      nbytes += kv.nbytes
    self.store.wait()
    return restored, nbytes

  def launch(self, rank: int) -> int:
    slots = [None] * self.facts.view.slots_per_rank
    self.store.add(rank, self.weights.dense, slots)
    return tree_bytes(self.weights.dense)

  def joined(self, rank: int) -> None:
    if self.checkpointer is not None:
      self.checkpointer.remember_rank(rank)

  def probe(self, ints: np.ndarray) -> np.ndarray:
    width = self.shape.options.chunk
    return self.store.run(self.facts.mesh, width, self.routing(), ints)[1]

  def routing(self) -> Any:
    """The routing table on the current mesh's devices."""
    if self._routing is None:
      self._routing = self.store.put_routing(
        self.facts.mesh, self.routing_of(self.facts.view.mesh)
      )
    return self._routing

  def changed(self) -> None:
    self._routing = None
    if self.checkpointer is not None:
      self.checkpointer.ring = self.facts.mesh

  def run_once(self, mesh: Mesh, width: int) -> None:
    self.store.make_ready(
      mesh, width, self.routing_of(np.array(mesh, np.int32))
    )

  def rebase_after(self, placed: tuple[Placed, ...]) -> None:
    """New places of requests; who sits on its own mirror gets another."""
    for p in placed:
      self.seats.moved(p)
    if self.checkpointer is None:
      return
    held = self.checkpointer.records()
    for p in placed:
      if held.get(p.request_id, (0, p.rank))[1] == p.rank:
        self._rebase.append(p.request_id)

  def memory(self) -> Memory:
    stored = self.checkpointer
    return Memory(
      int(self.facts.view.alive().sum()), tree_bytes(self.weights.dense),
      self.weights.host_bytes, stored.reserved_bytes if stored else 0,
    )  # fmt: skip

  def close(self) -> None:
    """Ends the background work; what the checkpoints came to is recorded."""
    self.readiness.close()
    if self.checkpointer is not None:
      lag = self.checkpointer.lag_steps()
      self.checkpointer.close()
      nbytes = self.checkpointer.nbytes_streamed
      self.record("checkpoint", bytes_total=nbytes, lag_steps=lag)

  # -- faults

  def _strike(self, faults: list[Fault]) -> bool:
    """Lets faults happen; whether the step at hand is lost."""
    aborted = False
    for fault in faults:
      self.record_fault(fault, self.seats.on(fault.ranks))
      if fault.kind == "rank_lost":
        aborted |= self._lose(fault.ranks)
      elif fault.kind == "rank_leaving":
        deadline = float(fault.deadline_s or 0.0)
        self.pending.append(RanksLeaving(fault.ranks, deadline))
      else:
        slowdown = float(fault.slowdown or 1.0)
        for rank in fault.ranks:
          self.pending.append(Straggler(rank, slowdown))
    return aborted

  def _lose(self, ranks: tuple[int, ...]) -> bool:
    """Deletes the ranks' memory; whether a member of the mesh is among them."""
    gone = [r for r in ranks if self.store.holds(r)]
    member = bool(set(gone) & set(self.facts.mesh))
    for rank in gone:
      self.store.lose(rank)
      self.readiness.drop_rank(rank)
      if self.checkpointer is not None:
        self.checkpointer.forget_rank(rank)
    if self.checkpointer is not None:
      held = self.checkpointer.records()
      self._rebase.extend(n for n, _ in self.seats.items() if n not in held)
    if gone:
      self.pending.append(RanksLost(tuple(gone)))
    return member

  def _rebase_one(self) -> None:
    """Stores one request's KV anew with a holder that lives."""
    if self.checkpointer is None or not self._rebase:
      return
    name = self._rebase.popleft()
    ring = self.checkpointer.ring
    place = self.seats.get(name)
    if place is not None and place.rank in ring and place.tokens:
      holder = self.checkpointer.holder(ring, ring.index(place.rank))
      kv = self.store.read_row(place.rank, place.row, place.tokens)
      self.checkpointer.rebase(name, kv, holder)
