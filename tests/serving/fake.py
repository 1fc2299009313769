"""A backend in NumPy: the "model" is a hash of all tokens before.

KV is the token itself, so that a request which is moved without its KV, or
computed twice or in the wrong row, says something else at once. Losses strike
at given steps, or after given numbers of recovery actions.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from resilient_moe import recovery as rm
from resilient_moe.recovery.policy import Standing
from resilient_moe.serving.backend import (
  Outcome,
  Placed,
  StepAborted,
  Stepwise,
)
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import StepBatch

VOCABULARY = 50
EMPTY, DEAD = -1, -2


def says(tokens: np.ndarray, seed: int) -> int:
  """The model."""
  assert (tokens >= 0).all(), f"KV that nobody computed, or dead: {tokens}"
  text = f"{seed}:{tokens.tolist()}".encode()
  return hashlib.sha1(text).digest()[0] % VOCABULARY


def answer(request: Request) -> tuple[int, ...]:
  """What a request must get, by the definition of the model."""
  known: list[int] = list(request.prompt)
  out: list[int] = []
  while len(out) < request.max_new_tokens:
    out.append(says(np.array(known), request.seed))
    known.append(out[-1])
    if out[-1] in request.stop:
      break
  return tuple(out)


class FakeBackend(Stepwise):
  """`serving.backend.Backend`; `advance` defines what actions do."""

  def __init__(
    self,
    view: rm.ClusterView,
    standing: Standing,
    *,
    max_len: int = 64,
    lose_at: Mapping[int, tuple[int, ...]] | None = None,
    leave_at: Mapping[int, tuple[int, ...]] | None = None,
    lose_in_recovery: Mapping[int, tuple[int, ...]] | None = None,
  ) -> None:
    self._view = rm.stand(view, standing)
    self.mode = standing.checkpoint
    shape = (len(view.status), standing.rows_per_rank, max_len)
    self.kv = np.full(shape, EMPTY, np.int64)
    self.saved: dict[str, tuple[np.ndarray, int]] = {}
    self.lose_at, self.leave_at = dict(lose_at or {}), dict(leave_at or {})
    self.lose_in_recovery = dict(lose_in_recovery or {})
    self.pending: list[rm.Failure] = []
    self.dead: set[int] = set()
    self.batches: list[StepBatch] = []
    self.handed_over = 0

  def view(self) -> rm.ClusterView:
    return self._view

  def domains(self) -> tuple[tuple[int, ...], ...]:
    return (tuple(self._view.mesh.tolist()),)

  def checkpoints(self) -> dict[str, tuple[int, int]]:
    return {n: (len(kv), holder) for n, (kv, holder) in self.saved.items()}

  def step(self, batch: StepBatch) -> np.ndarray:
    assert batch.mesh == tuple(self._view.mesh.tolist())
    assert batch.epoch == self._view.epoch
    assert not self.dead & set(batch.mesh), "a dead rank was asked to work"
    self._leave(self.leave_at.pop(batch.number, ()))
    # The loss strikes when everything is computed and nothing committed.
    delta, tokens = self._compute(batch)
    if ranks := self.lose_at.pop(batch.number, ()):
      self._lose(ranks)
      raise StepAborted
    for rank, row, start, values in delta.values():
      self.kv[rank, row, start : start + len(values)] = values
    self._stream(batch, delta)
    self.batches.append(batch)
    return tokens

  def _compute(self, batch: StepBatch) -> tuple[dict, np.ndarray]:
    tokens = np.full((len(batch.mesh), batch.decode.shape[1] + 1), EMPTY)
    delta: dict[str, tuple] = {}
    for r in batch.rows:
      token, position, seed = batch.decode[r.place, r.row]
      rank = batch.mesh[r.place]
      assert position == r.position
      before = self.kv[rank, r.row, :position]
      tokens[r.place, r.row] = says(np.append(before, token), seed)
      delta[r.request_id] = (rank, r.row, position, [token])
    for c in batch.chunks:
      start, length, row, seed = batch.chunk_fields[c.place]
      assert (start, length, row) == (c.start, c.length, c.row)
      rank = batch.mesh[c.place]
      values = batch.chunk[c.place, :length]
      before = self.kv[rank, row, :start]
      tokens[c.place, -1] = says(np.append(before, values), seed)
      delta[c.request_id] = (rank, row, start, values)
    assert len(delta) == len(batch.rows) + len(batch.chunks)
    return delta, tokens

  def execute(self, action: rm.Action, placed: tuple[Placed, ...]) -> Outcome:
    if isinstance(action, rm.RestoreKV | rm.RecomputePrefix):
      for p in placed:
        self._check_row(p)
      if isinstance(action, rm.RestoreKV):
        return Outcome(restored=self._restore(action, placed))
      return Outcome()
    before = dataclasses.replace(self._view, requests=rm.no_requests())
    self._view = rm.advance(before, action)
    if isinstance(action, rm.Fence):
      self.dead |= set(action.ranks)
    return Outcome(tier=str(getattr(action, "tier", "")))

  def _check_row(self, p: Placed) -> None:
    assert p.rank in self._view.mesh
    assert p.rank not in self.dead
    self.kv[p.rank, p.row] = EMPTY  # whoever sat there is gone

  def _restore(
    self, action: rm.RestoreKV, placed: tuple[Placed, ...]
  ) -> dict[str, int]:
    restored = {}
    for p in placed:
      alive = p.from_rank >= 0 and p.from_rank not in self.dead
      if action.tier == rm.Tier.PEER and alive:
        kv = self.kv[p.from_rank, p.from_row, : p.live_tokens].copy()
        self.handed_over += 1
      elif p.request_id in self.saved:
        kv = self.saved[p.request_id][0]
      else:
        continue
      self.kv[p.rank, p.row, : len(kv)] = kv
      restored[p.request_id] = len(kv)
    return restored

  def _stream(self, batch: StepBatch, delta: dict) -> None:
    """Checkpoints whole prefixes only; a neighbour's dies with it."""
    if self.mode == "none":
      return
    ring = self.ring(batch)
    for name, (rank, row, start, values) in delta.items():
      neighbour = ring[(ring.index(rank) + 1) % len(ring)]
      kv = self.kv[rank, row, : start + len(values)].copy()
      holder = neighbour if self.mode == "peer" else -1
      self.saved[name] = (kv, holder)

  def ring(self, batch: StepBatch) -> tuple[int, ...]:
    """Ranks that keep checkpoints, each for the one before."""
    return batch.mesh

  def poll(
    self, recovery_actions: int | None = None, repairing: bool = False
  ) -> tuple[rm.Failure, ...]:
    del repairing
    if recovery_actions in self.lose_in_recovery:
      self._lose(self.lose_in_recovery.pop(recovery_actions))
    failures, self.pending = tuple(self.pending), []
    return failures

  def _leave(self, ranks: tuple[int, ...]) -> None:
    if ranks:
      self.pending.append(rm.RanksLeaving(ranks, 60.0))

  def _lose(self, ranks: tuple[int, ...]) -> None:
    ranks = tuple(r for r in ranks if r not in self.dead)
    self.dead |= set(ranks)
    self.kv[list(ranks)] = DEAD
    self.saved = {n: s for n, s in self.saved.items() if s[1] not in self.dead}
    # As separate detectors would report it.
    self.pending.extend(rm.RanksLost((r,)) for r in ranks)

  def ready_for(self, action: rm.Action) -> bool:
    return True

  def background_done(self) -> bool:
    return True


def bare(ranks: int, experts: int = 8, rows: int = 3) -> rm.ClusterView:
  """An instance to prepare a policy on."""
  return rm.bare_view(ranks, experts, rows_per_rank=rows)
