"""The emulated runtime: N devices in one process, whose arrays can be lost.

A loss strikes in the middle of a step: the step's results are dropped, the
rank's arrays are deleted, and whatever would use them is an error. There is
no detection to measure; everything else is done on real arrays.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from resilient_moe.faults import Fault, Injector, Moment
from resilient_moe.model.step import pack, routing_arrays
from resilient_moe.recovery import (
  Failure,
  RanksLeaving,
  RanksLost,
  Standing,
  Straggler,
)
from resilient_moe.recovery.actions import Action
from resilient_moe.recovery.view import ClusterView
from resilient_moe.runtime.device_store import DeviceStore
from resilient_moe.runtime.execute import EXECUTE
from resilient_moe.runtime.facts import Facts
from resilient_moe.runtime.kv_checkpoint import KVCheckpointer
from resilient_moe.runtime.logical_store import LogicalStore
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.runtime.weights import WeightTiers
from resilient_moe.serving.backend import Outcome, Placed, StepAborted
from resilient_moe.serving.recover import Record
from resilient_moe.serving.scheduler import StepBatch

WAIT_S = 0.02  # between two looks at the compiler


class Place(NamedTuple):
  """Where a request's KV lies, and how much of it."""

  rank: int
  row: int
  tokens: int


class EmulatedBackend:
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
    self.facts = Facts(view)
    self.store = store
    self.weights = weights
    self.checkpointer = checkpointer
    self.readiness = readiness
    self.injector = injector
    self.record = record
    self.standing = standing
    self._now_s = now_s
    self._pending: list[Failure] = []
    self._placed: dict[str, Place] = {}
    self.canary_token = -1
    self._moment = Moment(step=0, t_s=0.0, emitted_tokens=0)
    self._rebase: collections.deque[str] = collections.deque()
    self._routing: Any = None
    self.announce()

  # -- the three duties

  def view(self) -> ClusterView:
    return self.facts.view

  def step(self, batch: StepBatch) -> np.ndarray:
    mesh = self.facts.mesh
    self._place(batch, committed=False)
    delta, tokens, ints = self.store.run(
      mesh, batch.width, self.routing(), packed(batch)
    )
    self._moment = Moment(
      step=batch.number, t_s=self._now_s(), emitted_tokens=batch.emitted,
      in_prefill=bool(batch.chunks), ready=self.readiness.done,
    )  # fmt: skip
    if self._strike(self.injector.poll(self._moment)):
      raise StepAborted
    # Only now: a commit on top of a step that fails would lose the cache.
    self.store.commit(mesh, batch.width, delta, ints)
    self._place(batch, committed=True)
    if self.checkpointer is not None:
      rows = self.store.shape.options.rows
      self.checkpointer.stream(batch, delta, rows)
    return tokens

  def execute(self, action: Action, placed: tuple[Placed, ...]) -> Outcome:
    epoch = self.facts.view.epoch
    outcome = EXECUTE[type(action)](self, action, placed)
    self._routing = None
    if self.facts.view.epoch != epoch:
      self.announce()
    return outcome

  def poll(self, recovery_actions: int | None = None) -> tuple[Failure, ...]:
    if recovery_actions is not None:
      self._moment = dataclasses.replace(
        self._moment, t_s=self._now_s(), in_prefill=False,
        recovery_actions=recovery_actions, ready=self.readiness.done,
      )  # fmt: skip
      self._strike(self.injector.poll(self._moment))
    elif not self._pending:
      self._make_ready()
      self._rebase_one()
    failures, self._pending = tuple(self._pending), []
    return failures

  def checkpoints(self) -> Mapping[str, tuple[int, int]]:
    if self.checkpointer is None:
      return {}
    self.checkpointer.drain()
    return self.checkpointer.records()

  def background_done(self) -> bool:
    return True

  # -- what the actions use (`execute.py`)

  def routing(self) -> Any:
    """The routing table on the current mesh's devices."""
    if self._routing is None:
      self._routing = self.store.put_routing(
        self.facts.mesh, self.routing_of(self.facts.view.mesh)
      )
    return self._routing

  def routing_of(self, mesh: np.ndarray) -> Any:
    """The routing arrays for a mesh; other ranks' entries are left out."""
    view = self.facts.view
    entries = view.table.entries
    outside = ~np.isin(entries[:, :, 0], mesh)
    entries = np.where(outside[:, :, None], -1, entries)
    # The step takes the first `copies` columns: live ones in front.
    order = np.argsort(entries[:, :, 0] < 0, axis=1, kind="stable")
    entries = np.take_along_axis(entries, order[:, :, None], axis=1)
    return routing_arrays(entries, mesh, view.slots_per_rank, view.masked)

  def run_once(self, mesh: tuple[int, ...], width: int) -> None:
    """Makes a mesh's program ready: loads it and runs it on idle rows."""
    self.store.make_ready(
      mesh, width, self.routing_of(np.array(mesh, np.int32))
    )

  def _make_ready(self) -> None:
    """One bite of the background work on ready meshes."""
    name = self.readiness.step(self.run_once)
    if name is None:
      return
    self.facts.ready(name, False)
    if self.standing.store_executables:
      self.facts.stored(name)

  def announce(self) -> None:
    view = self.facts.view
    self.record("epoch", epoch=view.epoch, mesh=list(self.facts.mesh))

  def rebase_after(self, placed: tuple[Placed, ...]) -> None:
    """New places of requests; who sits on its own mirror gets another."""
    if self.checkpointer is None:
      return
    held = self.checkpointer.records()
    for p in placed:
      self._placed[p.request_id] = Place(p.rank, p.row, 0)
      if held.get(p.request_id, (0, p.rank))[1] == p.rank:
        self._rebase.append(p.request_id)

  def wait_ready(self) -> None:
    """Blocks until every mesh that the policy wants is ready."""
    while not self.readiness.done:
      self._make_ready()
      if not self.readiness.working:
        time.sleep(WAIT_S)

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
      self._record_fault(fault)
      if fault.kind == "rank_lost":
        aborted |= self._lose(fault.ranks)
      elif fault.kind == "rank_leaving":
        deadline = float(fault.deadline_s or 0.0)
        self._pending.append(RanksLeaving(fault.ranks, deadline))
      else:
        slowdown = float(fault.slowdown or 1.0)
        for rank in fault.ranks:
          self._pending.append(Straggler(rank, slowdown))
    return aborted

  def _record_fault(self, fault: Fault) -> None:
    hit = [n for n, p in self._placed.items() if p.rank in fault.ranks]
    if fault.kind == "rank_lost" or fault.kind == "rank_leaving":
      affected = sorted(hit)
    else:
      affected = []
    recovering = self._moment.recovery_actions is not None
    phase = "prefill" if self._moment.in_prefill else "decode"
    self.record(
      "fault", kind=fault.kind, ranks=list(fault.ranks), affected=affected,
      phase="recovery" if recovering else phase, step=self._moment.step,
    )  # fmt: skip

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
      self._rebase.extend(n for n in self._placed if n not in held)
    if gone:
      self._pending.append(RanksLost(tuple(gone)))
    return member

  def _place(self, batch: StepBatch, committed: bool) -> None:
    """Notes where requests are, and, after the commit, how far."""
    for name in batch.retired:
      self._placed.pop(name, None)
    for r in batch.rows:
      tokens = r.position + int(committed)
      self._placed[r.request_id] = Place(batch.mesh[r.place], r.row, tokens)
    for c in batch.chunks:
      tokens = c.start + c.length * int(committed)
      self._placed[c.request_id] = Place(batch.mesh[c.place], c.row, tokens)

  def _rebase_one(self) -> None:
    """Stores one request's KV anew with a holder that lives."""
    if self.checkpointer is None or not self._rebase:
      return
    name = self._rebase.popleft()
    mesh = self.facts.mesh
    place = self._placed.get(name)
    if place is not None and place.rank in mesh and place.tokens:
      holder = self.checkpointer.holder(mesh, mesh.index(place.rank))
      kv = self.store.read_row(place.rank, place.row, place.tokens)
      self.checkpointer.rebase(name, kv, holder)


def packed(batch: StepBatch) -> np.ndarray:
  """A batch as the step's one int32 array."""
  return pack(
    batch.decode, batch.decode_temperature, batch.chunk, batch.chunk_fields,
    batch.chunk_temperature,
  )  # fmt: skip
