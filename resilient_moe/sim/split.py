"""The simulated runtime with attention and experts on different ranks.

Every attention rank (AW) steps by itself. An expert rank (EW) that dies, or a
link that breaks, stops a step only where no other rank that it can reach holds
what it needs; else the AW asks there, and the step takes `Timing.heal_s` (or
`link_s`) longer. That every step needs every expert is assumed.
"""

import dataclasses
import random
from collections.abc import Iterable
from typing import Any

import numpy as np

from resilient_moe import recovery as rm
from resilient_moe.faults import LINK_KINDS, Fault, Moment
from resilient_moe.recovery.checks import (
  expert_ranks,
  request_ranks,
  uncovered,
)
from resilient_moe.serving.backend import Outcome, Placed, Stepped
from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.sim.backend import Domain, Flight, SimulatedBackend

PATIENCE = 4  # rounds of steps, after which a fault strikes between two
_PARTS = {"attention": 0.25, "exchange": 0.5, "experts": 0.75}  # of a layer
Link = tuple[int, int]  # (attention, expert) ranks


@dataclasses.dataclass
class _Armed:
  """A loss that waits for its place in a step (`runtime.split.strikes`)."""

  fault: Fault
  part: float  # of the step
  rounds: int = 0
  aimed: bool = False


class SplitSimulated(SimulatedBackend):
  """Attention ranks that step apart (`serving.backend.Backend`)."""

  def __init__(self, *args: Any) -> None:
    self._armed: list[_Armed] = []
    self._known: set[Link] = set()  # EWs that an AW goes round by itself
    self._cut: set[Link] = set()
    self._delay_s: dict[Link, float] = {}
    self._sent = 0  # tokens through all layers
    super().__init__(*args)
    self._inside = random.Random(f"inside/{self.case.seed}")

  def domains(self) -> tuple[Domain, ...]:
    return tuple((int(r),) for r in request_ranks(self.facts))

  def close_ring(self) -> None:
    attend = (r for (r,) in self.domains() if r in self.there)
    self.copies.ring = tuple(attend)

  # -- steps

  def begin(self, batch: StepBatch) -> None:
    super().begin(batch)
    flight = self.flights[batch.mesh]
    self._sent += len(batch.rows) + batch.prefill_tokens
    for armed in self._armed:
      self._aim(armed, flight)
    self._look_around(flight)

  def _step_s(self, batch: StepBatch) -> float:
    (aw,) = batch.mesh
    seconds = super()._step_s(batch)
    members = expert_ranks(self.facts).tolist()
    seconds *= max((self.slow.get(r, 1.0) for r in members), default=1.0)
    late = [s for (a, e), s in self._delay_s.items() if a == aw]
    return seconds + max(late, default=0.0) * self.case.model.moe_layers

  def finished(self, wait_s: float) -> list[Stepped]:
    ended = super().finished(wait_s)
    if ended:
      self._between()
    return ended

  # -- where faults strike

  def _settled(self) -> bool:
    return super()._settled() and not self._armed

  def _strike_in(self, flight: Flight, faults: Iterable[Fault]) -> None:
    for fault in faults:
      if fault.kind != "rank_lost":
        self.happen(fault, flight.moment)
        continue
      expert = not any(map(self._attends, fault.ranks))
      places = ("exchange", "experts") if expert else ("attention", "exchange")
      place = fault.inside or self._inside.choice(places)
      layers = self.case.model.moe_layers
      layer = self._inside.randrange(layers)
      armed = _Armed(fault, (layer + _PARTS[place]) / layers)
      self._armed.append(armed)
      for other in list(self.flights.values()):
        if other is not flight:  # that one is aimed at as it begins
          self._aim(armed, other)

  def _aim(self, armed: _Armed, flight: Flight) -> None:
    """Lets a loss strike in this step, if it is one of its kind."""
    (stepping,) = flight.batch.mesh
    mine = [v for v in armed.fault.ranks if self._attends(v)]
    phase = "prefill" if flight.batch.chunks else "decode"
    if armed.aimed or armed.fault.phase not in ("any", phase):
      return
    if mine and stepping not in mine:
      return
    armed.aimed = True
    now = self.clock.now()
    at_s = now + armed.part * max(flight.ends_s - now, 0.0)
    self.clock.at(at_s, lambda: self._strike(armed, flight.moment))

  def _strike(self, armed: _Armed, moment: Moment) -> None:
    if armed in self._armed:
      self._armed.remove(armed)
      self.happen(armed.fault, moment)

  def _between(self) -> None:
    """What has waited for too long strikes between two steps."""
    for armed in list(self._armed):
      armed.rounds += 1
      if armed.rounds > PATIENCE:
        self._strike(armed, self._moment)

  def _attends(self, rank: int) -> bool:
    if rank not in self.there:
      return False
    attends = self.facts.role[rank] == rm.Role.ATTENTION
    return bool(attends) or bool(self.seats.on([rank]))

  def affected(self, fault: Fault) -> list[str]:
    """An expert rank serves everybody; an attention rank its own."""
    hit = [r for r in fault.ranks if self._attends(r)]
    if len(hit) < len(fault.ranks):
      hit = [r for (r,) in self.domains()]
    return self.seats.on(hit)

  # -- what faults do

  def happen(self, fault: Fault, moment: Moment) -> None:
    super().happen(fault, moment)
    if fault.kind in LINK_KINDS:
      self._break_link(fault)

  def _other(self, fault: Fault) -> None:
    if fault.kind not in LINK_KINDS:
      super()._other(fault)

  def _break_link(self, fault: Fault) -> None:
    aw, ew = fault.ranks
    link = (aw, ew)
    delay_s = float(fault.delay_s or 0.0)
    slow = fault.kind == "link_slow"
    if slow and delay_s < self.timing.link_s(self.facts):
      self._delay_s[link] = delay_s
    else:
      self._cut.add(link)
    if fault.resume_s is not None:
      at_s = self.clock.now() + float(fault.resume_s)
      self.clock.at(at_s, lambda: self._as_new(link))
    for flight in list(self.flights.values()):
      if flight.batch.mesh == (aw,):
        self._look_around(flight)

  def _as_new(self, link: Link) -> None:
    self._cut.discard(link)
    self._known.discard(link)
    self._delay_s.pop(link, None)

  def _forget(self, rank: int) -> None:
    """Whoever takes its place has links of its own."""
    super()._forget(rank)
    for link in {*self._cut, *self._known, *self._delay_s}:
      if rank in link:
        self._as_new(link)

  def lose(self, ranks: Iterable[int]) -> None:
    """Others step on before a plan says who is in: no dead rank mirrors."""
    super().lose(ranks)
    self.close_ring()
    for flight in list(self.flights.values()):
      self._look_around(flight)

  def _look_around(self, flight: Flight) -> None:
    """An AW meets the EWs that don't answer it; asks elsewhere or gives up."""
    (aw,) = flight.batch.mesh
    if flight.lost or aw not in self.there:
      return
    table = self.facts.table.entries[:, :, 0]
    used = np.unique(table[table >= 0]).tolist()
    cut = {e for a, e in self._cut if a == aw}
    silent = [e for e in used if e not in self.there or e in cut]
    if not silent and not len(uncovered(self.facts)):
      return
    news = [e for e in silent if (aw, e) not in self._known]
    missing = self._missing(aw, cut)
    heal_s = max((self._silence_s(e) for e in news), default=0.0)
    when_s = self.clock.now() + heal_s
    for ew in news if not missing else [e for e in silent if e in cut]:
      if ew in self.there and (not missing or self._holds(ew, missing)):
        self._report_link(aw, ew, not missing, when_s)
    if missing:  # it waits for a push that helps, until it is told of a plan
      told_s = [self.unnoticed.get(e, 0.0) for e in silent]
      ends_s = max([when_s + self.timing.heal_s(self.facts), *told_s])
      self.give_up(flight, ends_s)
      return
    for ew in news:
      self._known.add((aw, ew))
      self._heal(aw, ew, int((table == ew).any(axis=1).sum()), heal_s)
    if heal_s:
      self._end_at(flight, flight.ends_s + heal_s)

  def _silence_s(self, ew: int) -> float:
    """Until an AW knows what a silent EW's silence means."""
    if ew in self.there:
      return self.timing.link_s(self.facts)
    return self.timing.heal_s(self.facts)

  def _missing(self, aw: int, cut: set[int]) -> set[int]:
    """Experts that no EW has whom this AW reaches."""
    reached = [
      r for r in expert_ranks(self.facts).tolist()
      if r in self.there and r not in cut
    ]  # fmt: skip
    wanted = np.flatnonzero(~self.facts.masked)
    held = self.facts.slots[reached]
    return set(np.setdiff1d(wanted, held).tolist())

  def _holds(self, ew: int, experts: set[int]) -> bool:
    return bool(experts.intersection(self.facts.slots[ew].tolist()))

  def _heal(self, aw: int, ew: int, experts: int, seconds: float) -> None:
    self.clock.at(
      self.clock.now() + seconds,
      lambda: self.record(
        "healed", by=aw, rank=ew, layer=0, experts=experts, seconds=seconds
      ),
    )

  def _report_link(
    self, aw: int, ew: int, elsewhere: bool, when_s: float
  ) -> None:
    failure = rm.LinkLost(aw, ew, elsewhere)

    def report() -> None:
      if failure not in self.pending:
        self.pending.append(failure)

    self.clock.at(when_s, report)

  # -- actions

  def execute(self, action: rm.Action, placed: tuple[Placed, ...]) -> Outcome:
    for p in placed:  # whatever becomes of their KV
      self.seats.moved(p)
    return super().execute(action, placed)

  def close(self) -> None:
    """What went over the links is recorded: an expectation, not a count."""
    model = self.case.model
    holders = max(len(expert_ranks(self.facts)), 1)
    ranks = holders * (1 - (1 - 1 / holders) ** model.top_k)
    each = self._sent * model.moe_layers * model.embedding_bytes
    self.record(
      "exchange", sent_bytes=int(each * ranks),
      returned_bytes=each * model.top_k,
    )  # fmt: skip
    super().close()
