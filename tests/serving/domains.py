"""The fake backend with attention and experts apart, stepping side by side.

Steps of several domains are under way at once and end in a drawn order, also
while actions are carried out. What the loop must not do to them is asserted
here, where it would do it.
"""

from typing import Any

import numpy as np

from resilient_moe import recovery as rm
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.report import History
from resilient_moe.report.history import of_kind
from resilient_moe.serving.backend import (
  Outcome,
  Placed,
  StepAborted,
  Stepped,
)
from resilient_moe.serving.loop import serve
from resilient_moe.serving.scheduler import StepBatch
from tests.serving import fake
from tests.serving.runs import Intake, begun

Domain = tuple[int, ...]


class Domains(fake.FakeBackend):
  """One step a domain at a time; an expert rank stops all that need it."""

  def __init__(
    self, view: rm.ClusterView, standing: rm.Standing, history: History,
    rng: np.random.Generator, *, quick: float = 0.5, **faults: Any,
  ) -> None:  # fmt: skip
    """`quick`: how likely a step has ended when somebody looks."""
    super().__init__(view, standing, **faults)
    self.running: dict[Domain, StepBatch] = {}
    self.begun: list[StepBatch] = []
    self.ended: list[tuple[StepBatch, bool]] = []
    self._history, self._rng, self._quick = history, rng, quick
    self.meanwhile = lambda: None

  def domains(self) -> tuple[Domain, ...]:
    return tuple((int(r),) for r in request_ranks(self._view))

  def call_meanwhile(self, meanwhile: Any) -> None:
    self.meanwhile = meanwhile

  def begin(self, batch: StepBatch) -> None:
    assert batch.mesh in self.domains()
    assert batch.mesh not in self.running, "one at a time each"
    assert batch.number not in {b.number for b in self.running.values()}
    assert batch.epoch == self._view.epoch
    assert not parts(batch) & self.paused(), "a held request in a step"
    self.running[batch.mesh] = batch
    self.begun.append(batch)

  def paused(self) -> set[str]:
    """Whom the plan holds that is being resumed."""
    for event in reversed(list(self._history)):
      if event["event"] == "resumed":
        break
      if event["event"] == "plan":
        return set(event["paused"])
    return set()

  def finished(self, wait_s: float) -> list[Stepped]:
    waiting = list(self.running)
    self._rng.shuffle(waiting)
    ends = [d for d in waiting if self._rng.random() < self._quick]
    if wait_s and not ends:
      ends = waiting[:1]
    return [self._end(tuple(d)) for d in ends]

  def _end(self, domain: Domain) -> Stepped:
    batch = self.running.pop(domain)
    try:
      stepped = Stepped(batch, self.step(batch))
    except StepAborted:
      stepped = Stepped(batch, None)
    self.ended.append((batch, stepped.tokens is not None))
    return stepped

  def step(self, batch: StepBatch) -> np.ndarray:
    if ranks := self.lose_at.pop(batch.number, ()):
      self._lose(ranks)
    self._leave(self.leave_at.pop(batch.number, ()))
    if batch.mesh[0] in self.dead or self._unreachable():
      raise StepAborted
    delta, tokens = self._compute(batch)
    for rank, row, start, values in delta.values():
      self.kv[rank, row, start : start + len(values)] = values
    self._stream(batch, delta)
    self.batches.append(batch)
    return tokens

  def _unreachable(self) -> bool:
    """Whether some expert that the gate may choose is held by nobody."""
    live = self._view.alive() & ~np.isin(
      np.arange(len(self._view.status)), list(self.dead)
    )
    held = np.unique(self._view.slots[live])
    missing = np.setdiff1d(np.arange(self._view.n_experts), held)
    return bool((~self._view.masked[missing]).any())

  def ring(self, batch: StepBatch) -> Domain:
    ranks = (r for (r,) in self.domains() if r not in self.dead)
    return tuple(ranks) or batch.mesh

  def execute(self, action: rm.Action, placed: tuple[Placed, ...]) -> Outcome:
    moved = {p.request_id for p in placed}
    for batch in self.running.values():
      assert not parts(batch) & moved, "moved in the middle of a step"
    before = len(self.begun)
    if self._rng.random() < 0.5:
      self.meanwhile()
    if isinstance(action, rm.RestoreKV):
      begun = {r for b in self.begun[before:] for r in b.mesh}
      assert not begun & set(action.to), "a step queues behind KV that comes"
    outcome = super().execute(action, placed)
    if isinstance(action, rm.LaunchRank):
      self.dead.discard(action.rank)
      self.kv[action.rank] = fake.EMPTY
    return outcome


def parts(batch: StepBatch) -> set[str]:
  return {p.request_id for p in (*batch.rows, *batch.chunks)}


def bare(attention: int, experts: int) -> rm.ClusterView:
  return rm.bare_view(
    attention + experts, 8, rows_per_rank=3, attention=attention
  )


def run(
  policy: rm.RecoveryPolicy, requests: Any, rng: np.random.Generator, *,
  attention: int = 3, experts: int = 3, chunk: int = 5, **faults: Any,
) -> tuple[History, Domains]:  # fmt: skip
  """Serves until the end."""
  history = begun(policy, requests)
  view = bare(attention, experts)
  backend = Domains(view, policy.prepare(view), history, rng, **faults)
  serve(Intake(requests), backend, policy, history.write, chunk=chunk)
  history.write("end")
  return history, backend


def check_steps(history: History, backend: Domains) -> None:
  """Numbers, and who is told that requests have ended."""
  committed = [e["step"] for e in of_kind(history, "step")]
  assert len(set(committed)) == len(committed)
  assert sorted(committed) == sorted(b.number for b, ok in backend.ended if ok)
  failed = [e["step"] for e in of_kind(history, "step_failed")]
  assert len(failed) == sum(not ok for _, ok in backend.ended)
  told = [n for b, ok in backend.ended if ok for n in b.retired]
  assert len(told) == len(set(told)), "told twice"
  untold = {e["request_id"] for e in of_kind(history, "finished")} - set(told)
  # Only in the last step of a domain that was there till the end.
  ends = {b.mesh: parts(b) for b, ok in backend.ended if ok}
  assert untold <= {n for d in backend.domains() for n in ends.get(d, ())}
