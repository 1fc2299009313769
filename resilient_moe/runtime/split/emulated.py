"""The emulated runtime with attention and experts on different ranks."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from resilient_moe.faults import LINK_KINDS, Fault, Moment
from resilient_moe.mesh.executables import Source
from resilient_moe.recovery import LinkLost, RanksLeaving, Role, Straggler
from resilient_moe.recovery.actions import Action, Move
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.runtime.emulated import EmulatedBackend
from resilient_moe.runtime.execute import Mesh
from resilient_moe.runtime.instance import packed
from resilient_moe.runtime.split.attention import Step
from resilient_moe.runtime.split.inline import Hook
from resilient_moe.runtime.split.store import SplitStore
from resilient_moe.runtime.split.strikes import Strikes
from resilient_moe.runtime.split.tables import routes_of
from resilient_moe.runtime.split.walk import Asked
from resilient_moe.runtime.weights import tree_bytes
from resilient_moe.serving.backend import (
  Outcome,
  Placed,
  StepAborted,
  Stepped,
)
from resilient_moe.serving.scheduler import StepBatch


class SplitEmulated(EmulatedBackend):
  """Every attention rank steps by itself (`serving.backend.Backend`)."""

  store: SplitStore  # type: ignore[assignment]

  def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
    self._version = 0  # of the routes that were pushed last
    self._moments: dict[int, Moment] = {}  # rank -> of its last step
    super().__init__(*args, **kwargs)
    self._strikes = Strikes(
      seed, self.shape.config.moe_layers, self._attends, self._happen
    )
    self.store.on_event = self._on_event
    self._push()

  @property
  def _processes(self) -> dict[int, int]:
    """Rank -> how often it was replaced."""
    return self.store.links.incarnations

  def domains(self) -> tuple[Mesh, ...]:
    return tuple((int(r),) for r in request_ranks(self.facts.view))

  # -- steps

  def step(self, batch: StepBatch) -> np.ndarray:
    (ended,) = self._together((batch,))
    if ended.tokens is None:
      raise StepAborted
    return ended.tokens

  def finished(self, wait_s: float) -> list[Stepped]:
    """All steps that were begun, layer by layer together."""
    del wait_s
    begun, self._begun = self._begun, ()
    return self._together(begun)

  def _together(self, batches: Sequence[StepBatch]) -> list[Stepped]:
    self._mend_links()
    self._strikes.prefills = {b.mesh[0] for b in batches if b.chunks}
    for batch in batches:
      self.seats.note(batch, committed=False)
      for fault in self.due_in_step(batch, self._settled()):
        self._begin_fault(fault)
      self._moments[batch.mesh[0]] = self._moment
    there = [b for b in batches if self.store.attends(b.mesh[0])]
    steps = self.store.steps([self._asked(b) for b in there])
    self._strikes.between()
    made = dict(zip((b.number for b in there), steps, strict=True))
    return [Stepped(b, self._counts(b, made.get(b.number))) for b in batches]

  def _settled(self) -> bool:
    """Nothing is under way: no repair, no fault on its way, none unheard."""
    busy = self.repairing or self.pending or self._strikes.waiting
    return self.readiness.done and not busy

  def _asked(self, batch: StepBatch) -> Asked:
    (rank,) = batch.mesh
    hook: Hook = _nothing  # it is called some 70 times a round
    if self._strikes.waiting:
      hook = functools.partial(self._reached, rank)
    return Asked(rank, batch.width, packed(batch), hook)

  def _counts(
    self, batch: StepBatch, step: Step | Exception | None
  ) -> np.ndarray | None:
    """Commits a step that got through; its tokens."""
    (rank,) = batch.mesh
    if not isinstance(step, Step) or not self.store.attends(rank):
      return None
    # Only now: a commit on top of a step that fails would lose the cache.
    self.store.commit(rank, step)
    self.seats.note(batch, committed=True)
    if self.checkpointer is not None:
      rows = self.shape.options.rows
      self.checkpointer.stream(batch, step.delta, rows)
    return step.tokens

  def probe(self, ints: np.ndarray) -> np.ndarray:
    """A wide step of each attention rank without a commit."""
    width = self.shape.options.chunk
    steps = [
      self.store.step(rank, width, ints[i : i + 1], _nothing)
      for i, (rank,) in enumerate(self.domains())
    ]
    return np.concatenate([step.tokens for step in steps])

  def execute(self, action: Action, placed: tuple[Placed, ...]) -> Outcome:
    for p in placed:  # whatever becomes of their KV
      self.seats.moved(p)
    return super().execute(action, placed)

  # -- what the actions use (`execute.Hands`)

  def load(self, mesh: Mesh, run: bool) -> Source:
    del mesh, run
    return Source.WARM  # programs belong to ranks

  def run_once(self, mesh: Mesh, width: int) -> None:
    raise AssertionError(f"no program of width {width} belongs to mesh {mesh}")

  def write_slot(self, move: Move, weights: dict[str, Any]) -> None:
    self.store.write_slot(move.rank, move.slot, move.expert, weights)

  def launch(self, rank: int) -> int:
    view = self.facts.view
    empty = [-1] * view.slots_per_rank
    self.store.add(rank, self.weights, empty, Role(view.home[rank]))
    self._processes[rank] = self._processes.get(rank, 0) + 1
    return tree_bytes(self.weights.dense)

  def switch(self, rank: int, role: Role) -> None:
    """The rank gets what its new role needs; KV stays until it has moved."""
    attention = role == Role.ATTENTION
    if attention and self.store.computes(rank):
      self.store.leave(rank, Role.EXPERT)
    has = self.store.attends if attention else self.store.computes
    if not has(rank):  # else it has not given that up yet, and keeps it
      empty = [-1] * self.facts.view.slots_per_rank
      self.store.add(rank, self.weights, empty, role)

  def changed(self) -> None:
    """Who gave up attention and has nobody left gives up its KV; tables."""
    view = self.facts.view
    for rank in np.flatnonzero(view.alive() & (view.role == Role.EXPERT)):
      if self.store.attends(int(rank)) and not self.seats.on([int(rank)]):
        self.store.leave(int(rank), Role.ATTENTION)
    self._push()

  def _push(self) -> None:
    self._version += 1
    view = self.facts.view
    self.store.push(routes_of(view, self._version, self._processes))
    self._close_ring()

  def _close_ring(self) -> None:
    """Checkpoints go round the attention ranks that are there."""
    if self.checkpointer is not None:
      attend = (r for (r,) in self.domains() if self.store.attends(r))
      self.checkpointer.ring = tuple(attend)

  def close(self) -> None:
    """Ends the background work; what went over the links is recorded."""
    traffic = self.store.traffic().values()
    sent, back = np.array([(0, 0), *traffic]).sum(axis=0).tolist()
    self.record("exchange", sent_bytes=sent, returned_bytes=back)
    super().close()

  # -- faults

  def _attends(self, rank: int) -> bool:
    return self.store.attends(rank)

  def _begin_fault(self, fault: Fault) -> None:
    if fault.kind == "rank_lost":
      self._strikes.arm(fault)
    else:
      self._happen(fault)

  def _happen(self, fault: Fault) -> None:
    """Ground truth, at its moment."""
    self.record_fault(fault, self._affected(fault))
    if fault.kind == "rank_lost":
      self._lose(fault.ranks)
    elif fault.kind in LINK_KINDS:
      self._break_link(fault)
    elif fault.kind == "rank_leaving":
      deadline_s = float(fault.deadline_s or 0.0)
      self.pending.append(RanksLeaving(fault.ranks, deadline_s))
    else:
      slowdown = float(fault.slowdown or 1.0)
      self.pending.extend(Straggler(r, slowdown) for r in fault.ranks)

  def _affected(self, fault: Fault) -> list[str]:
    """An expert rank serves everybody; an attention rank its own."""
    hit = [r for r in fault.ranks if self._attends(r)]
    if fault.kind not in LINK_KINDS and len(hit) < len(fault.ranks):
      hit = [r for (r,) in self.domains()]
    return self.seats.on(hit)

  def _strike(self, faults: list[Fault]) -> bool:
    """Those that come in a recovery: at once."""
    for fault in faults:
      self._happen(fault)
    return bool(faults)

  def _lose(self, ranks: tuple[int, ...]) -> bool:
    """Others step on before a plan says who is in: no dead rank mirrors."""
    member = super()._lose(ranks)
    self._close_ring()
    return member

  def _break_link(self, fault: Fault) -> None:
    link = (fault.ranks[0], fault.ranks[1])
    delay_s = None if fault.kind == "link_cut" else float(fault.delay_s or 0.0)
    self.store.links.spoil(link, delay_s, fault.resume_s)

  def _mend_links(self) -> None:
    for attention, expert in self.store.links.mend():
      if self.store.attends(attention):
        self.store.routes_of(attention).up(expert)

  def _reached(self, rank: int, place: str, at: int, layer: int) -> None:
    self._moment = self._moments[rank]  # steps of others began since
    self._strikes.reached(rank, place, at, layer)
    if not self.store.attends(rank):
      raise StepAborted

  def _on_event(self, name: str, by: int, **facts: Any) -> None:
    """What an attention rank has found out by itself."""
    if name == "healed":
      self.record("healed", by=by, rank=facts["rank"], **_cost(facts))
    elif name == "link_bad":
      failure = LinkLost(by, facts["rank"], facts["elsewhere"])
      if failure not in self.pending:
        self.pending.append(failure)


def _cost(facts: dict[str, Any]) -> dict[str, Any]:
  return {key: facts[key] for key in ("layer", "experts", "seconds")}


def _nothing(place: str, rank: int, layer: int) -> None:
  del place, rank, layer

