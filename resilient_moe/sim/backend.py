"""The simulated runtime: no arrays, a cost model in virtual time.

The same faults, facts, checkpoints and readiness as on the other runtimes; an
action changes the view as `recovery.advance` says. Fault and detection are
apart: a rank that has died is read by nobody, but the loop only learns of it
`Timing.detect_s` later.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from resilient_moe import recovery as rm
from resilient_moe.faults import Fault, Injector, Moment
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.reserve import Memory
from resilient_moe.serving.backend import Outcome, Placed, Stepped
from resilient_moe.serving.carry import Record
from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.serving.seats import Seats
from resilient_moe.sim import behind, effects
from resilient_moe.sim.background import Background
from resilient_moe.sim.case import SimulatedCase
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.copies import Copies
from resilient_moe.sim.timing import Timing
from resilient_moe.sim.tokens import Rows, mask_key

HURTS = ("rank_lost", "rank_leaving")  # kinds that hit who sits there
Domain = tuple[int, ...]


@dataclasses.dataclass
class Flight:
  """A step that is under way."""

  batch: StepBatch
  began_s: float
  ends_s: float
  key: bytes  # of the mask that it computes under
  moment: Moment
  lost: bool = False  # nothing of it will count


class SimulatedBackend:
  """Ranks that exist as facts (`serving.backend.Backend`)."""

  def __init__(
    self, case: SimulatedCase, view: rm.ClusterView, standing: rm.Standing,
    timing: Timing, clock: VirtualClock, injector: Injector, record: Record,
  ) -> None:  # fmt: skip
    self.case, self.standing = case, standing
    self.timing, self.clock = timing, clock
    self.injector, self.record = injector, record
    self.facts = view
    self.there = set(np.flatnonzero(view.alive()).tolist())  # have memory
    self.rows = Rows(case.model.vocab_size)
    self.seats = Seats()
    lag = (lambda n: 0.0) if case.by_step else (
      lambda n: timing.checkpoint_lag_s(n, self.facts)
    )  # fmt: skip
    self.copies = Copies(
      standing.checkpoint, clock, lag, case.model.token_kv_bytes
    )
    self.background = Background(
      clock, lambda n: timing.mesh_ready_s(n, self.facts), case.by_step
    )
    self.flights: dict[Domain, Flight] = {}
    self.pending: list[rm.Failure] = []  # reported by the next poll
    self.repairing = False
    self.slow: dict[int, float] = {}  # rank -> how much slower
    self.unnoticed: dict[int, float] = {}  # dead, and when it is known, s
    self._ended: list[Stepped] = []
    self.rebase: list[str] = []
    self._random = random.Random(f"sim/{case.seed}")
    self._meanwhile: Callable[[], None] = lambda: None
    self._acting = False
    self._resumed = False  # the next step is the first behind a recovery
    self._seen_s = -1.0  # when `finished` was called last
    self._moment = Moment(step=0, t_s=0.0, emitted_tokens=0)
    self.announce()

  # -- facts

  def view(self) -> rm.ClusterView:
    return self.facts

  def domains(self) -> tuple[Domain, ...]:
    return (tuple(self.facts.mesh.tolist()),)

  def checkpoints(self) -> Mapping[str, tuple[int, int]]:
    return self.copies.records()

  def announce(self) -> None:
    """Writes the membership into the history; who mirrors for whom."""
    mesh = self.facts.mesh.tolist()
    self.record("epoch", epoch=self.facts.epoch, mesh=mesh)
    self.close_ring()

  def close_ring(self) -> None:
    self.copies.ring = tuple(self.facts.mesh.tolist())

  def memory(self) -> Memory:
    """What is held beside experts and rows."""
    view, model = self.facts, self.case.model
    host = model.expert_bytes * model.n_experts * self.standing.host_weights
    rows = view.rows_per_rank * len(request_ranks(view))
    kept = rows * self.case.row_bytes * (self.copies.mode != "none")
    return Memory(len(self.there), model.dense_bytes, host, kept)

  # -- steps

  def call_meanwhile(self, meanwhile: Callable[[], None]) -> None:
    self._meanwhile = meanwhile

  def begin(self, batch: StepBatch) -> None:
    self.clock.catch_up()
    self.seats.note(batch, committed=False)
    faults = self._due_in_step(batch)
    now, seconds = self.clock.now(), self._step_s(batch)
    flight = Flight(
      batch, now, now + seconds, mask_key(self.facts.masked), self._moment
    )
    self.flights[batch.mesh] = flight
    self._strike_in(flight, faults)
    self._end_at(flight, flight.ends_s)

  def _step_s(self, batch: StepBatch) -> float:
    slowest = max((self.slow.get(r, 1.0) for r in batch.mesh), default=1.0)
    seconds = self.timing.step_s(batch, self.facts) * slowest
    if self._resumed:
      self._resumed = False
      seconds += self.timing.after_resume_s(batch)
    return seconds

  def _end_at(self, flight: Flight, when_s: float) -> None:
    flight.ends_s = when_s
    self.clock.at(when_s, functools.partial(self._end, flight))

  def _end(self, flight: Flight) -> None:
    """Computes and commits, unless it was lost (or lasts longer by now)."""
    batch = flight.batch
    if self.flights.get(batch.mesh) is not flight:
      return
    if self.clock.now() < flight.ends_s:
      return
    del self.flights[batch.mesh]
    if flight.lost or not self.there.issuperset(batch.mesh):
      self._ended.append(Stepped(batch, None))
      return
    tokens, delta = self.rows.compute(batch, flight.key)
    self.rows.commit(delta)
    self.seats.note(batch, committed=True)
    self.copies.stream(batch, delta)
    self._ended.append(Stepped(batch, tokens))

  def finished(self, wait_s: float) -> list[Stepped]:
    self.clock.catch_up()
    still = self.clock.now() <= self._seen_s
    if not self._ended and self.flights and not self._acting:
      # A loop that is busy goes on at once, unless it waits for a step.
      if wait_s or still or self.case.by_step:
        self.clock.step()
      # One mesh: nothing is done beside its step, as nothing is for real.
      whole = self.case.by_step or not self.facts.disaggregated
      while whole and not self._ended:
        self.clock.step()
    self._seen_s = self.clock.now()
    ended, self._ended = self._ended, []
    return ended

  # -- faults and failures

  def _settled(self) -> bool:
    """Nothing is under way behind traffic, no loss is unnoticed."""
    busy = self.repairing or self.pending or self.unnoticed
    return self.background.done and not busy

  def _due_in_step(self, batch: StepBatch) -> list[Fault]:
    self._moment = Moment(
      step=batch.number, t_s=self.clock.now(), emitted_tokens=batch.emitted,
      in_prefill=bool(batch.chunks), ready=self._settled(),
    )  # fmt: skip
    return self.injector.poll(self._moment)

  def _due_in_recovery(self, actions: int) -> list[Fault]:
    self._moment = dataclasses.replace(
      self._moment, t_s=self.clock.now(), in_prefill=False,
      recovery_actions=actions, ready=self.background.done,
    )  # fmt: skip
    return self.injector.poll(self._moment)

  def _strike_in(self, flight: Flight, faults: Iterable[Fault]) -> None:
    """Faults strike somewhere within a step."""
    for fault in faults:
      part = self.timing.strike(self._random.random())
      at_s = flight.began_s + part * (flight.ends_s - flight.began_s)
      self.clock.at(
        at_s, functools.partial(self.happen, fault, flight.moment)
      )

  def happen(self, fault: Fault, moment: Moment) -> None:
    """Ground truth, at its moment."""
    phase = "prefill" if moment.in_prefill else "decode"
    if moment.recovery_actions is not None:
      phase = "recovery"
    hit = self.affected(fault) if fault.kind in HURTS else []
    self.record(
      "fault", kind=fault.kind, ranks=list(fault.ranks), affected=hit,
      phase=phase, step=moment.step,
    )  # fmt: skip
    if fault.kind == "rank_lost":
      self.lose(fault.ranks)
    elif fault.kind == "rank_leaving":
      deadline_s = float(fault.deadline_s or 0.0)
      self._report(fault, rm.RanksLeaving(fault.ranks, deadline_s))
    else:
      self._other(fault)

  def _other(self, fault: Fault) -> None:
    """Kinds that take nobody away."""
    slowdown = float(fault.slowdown or 1.0)
    for rank in fault.ranks:
      if not self.case.by_step:
        self.slow[rank] = slowdown
      self._report(fault, rm.Straggler(rank, slowdown))

  def affected(self, fault: Fault) -> list[str]:
    """Requests that a fault hits."""
    return self.seats.on(fault.ranks)

  def lose(self, ranks: Iterable[int]) -> None:
    """Ranks and their memory are gone; soon somebody notices."""
    gone = [r for r in ranks if r in self.there]
    if not gone:
      return
    for rank in gone:
      self._forget(rank)
    kept = self.copies.records()
    if self.copies.mode != "none":
      self.rebase += [n for n, _ in self.seats.items() if n not in kept]
    failure = rm.RanksLost(tuple(gone))
    seconds = self.timing.detect_s("rank_lost", self._random.random())
    noticed_s = self.clock.now() + seconds
    self.unnoticed |= dict.fromkeys(gone, noticed_s)
    self.clock.at(noticed_s, lambda: self._notice(failure))
    self._stop_flights(set(gone), noticed_s)

  def _notice(self, failure: rm.RanksLost) -> None:
    for rank in failure.ranks:
      self.unnoticed.pop(rank, None)
    self.pending.append(failure)

  def _stop_flights(self, gone: set[int], noticed_s: float) -> None:
    """A collective with a dead member ends for the others when they know."""
    for flight in self.flights.values():
      if gone & set(flight.batch.mesh):
        self.give_up(flight, noticed_s)

  def give_up(self, flight: Flight, when_s: float) -> None:
    """A step that will not count, as somebody knows by then."""
    flight.lost = True
    if not self.case.by_step:  # else all end together
      self._end_at(flight, when_s)

  def _forget(self, rank: int) -> None:
    """A rank's memory is gone."""
    self.there.discard(rank)
    self.rows.lose(rank)
    self.background.drop_rank(rank)
    self.copies.forget_rank(rank)
    self.slow.pop(rank, None)

  def _report(self, fault: Fault, failure: rm.Failure) -> None:
    seconds = self.timing.detect_s(fault.kind, self._random.random())
    self.clock.at(
      self.clock.now() + seconds,
      lambda: None if failure in self.pending else self.pending.append(failure),
    )

  def poll(
    self, recovery_actions: int | None = None, repairing: bool = False
  ) -> tuple[rm.Failure, ...]:
    self.clock.spend(self.timing.turn_s)
    if recovery_actions is not None:
      self._resumed = True
      for fault in self._due_in_recovery(recovery_actions):
        self.happen(fault, self._moment)
      self.clock.catch_up()
    else:
      self.repairing = repairing
      if not self.pending:
        behind.make_ready(self)
        behind.rebase_one(self)
    failures, self.pending = tuple(self.pending), []
    # A recovery begins: until a poll says otherwise, something is repaired.
    self.repairing |= bool(failures)
    return failures

  # -- behind traffic

  def wait_ready(self) -> None:
    """Until every mesh that the policy wants is ready."""
    behind.wait_ready(self)

  def ready_for(self, action: rm.Action) -> bool:
    return behind.ready_for(self, action)

  def background_done(self) -> bool:
    return True

  # -- actions

  def execute(self, action: rm.Action, placed: tuple[Placed, ...]) -> Outcome:
    self.clock.catch_up()
    if effects.needs(action, placed, self.facts) & self.unnoticed.keys():
      while not self.pending:
        self.clock.step()
      return Outcome(f"abandoned: {self.pending[0]}")
    spent = self.timing.action(action, self.facts, placed)
    self._let_pass(spent.seconds)
    epoch = self.facts.epoch
    outcome = effects.execute(self, action, placed, spent)
    self.changed(placed)
    if self.facts.epoch != epoch:
      self.announce()
    return outcome

  def changed(self, placed: tuple[Placed, ...]) -> None:
    """The facts may be others now."""
    del placed
    self.close_ring()

  def _let_pass(self, seconds: float) -> None:
    """An action's time, in which other domains step on."""
    until_s = self.clock.now() + seconds
    self._acting = True
    while self.facts.disaggregated and not self.case.by_step:
      next_s = self.clock.next_s()
      if next_s is None or next_s > until_s:
        break
      self.clock.step()
      if self._ended:
        self._meanwhile()
    self._acting = False
    self.clock.spend(max(until_s - self.clock.now(), 0.0))

  def drop(self, ranks: Iterable[int]) -> None:
    """Ends whatever of these ranks is still there."""
    for rank in ranks:
      self.unnoticed.pop(rank, None)
      if rank in self.there:
        self._forget(rank)

  def close(self) -> None:
    """What the checkpoints came to is recorded."""
    if self.copies.mode != "none":
      self.record(
        "checkpoint", bytes_total=self.copies.nbytes,
        lag_steps=self.copies.underway,
      )  # fmt: skip
    for name in dict.fromkeys(self.rows.wrong):
      self.record("warning", text=f"request {name!r} had foreign KV in its row")

