"""Continuous batching: which tokens the next step computes.

`schedule` returns a batch and the state to adopt *if the step counts*;
`complete` folds the sampled tokens in. Neither reads a clock, so that every
replica of the scheduler decides the same.
"""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from resilient_moe.serving.request import Request, Sequence
from resilient_moe.serving.state import SchedulerState, drop, place

# A suffix this short is fed through decode rows, one token a step: cheaper
# than widening the step for everybody.
SHORT_SUFFIX = 3


class Row(NamedTuple):
  """One decode row of a step."""

  place: int  # position of the rank in the mesh
  row: int
  request_id: str
  position: int  # of the token that is fed
  samples: bool  # whether the sampled token is a new one


class Chunk(NamedTuple):
  """A rank's chunk of prompt tokens in a step."""

  place: int
  row: int
  request_id: str
  start: int
  length: int
  samples: bool


@dataclasses.dataclass(frozen=True)
class StepBatch:
  """What a backend computes in one step. `B` rows a rank, `C` chunk width."""

  number: int
  epoch: int
  mesh: tuple[int, ...]
  width: int  # C; 0: decode only
  rows: tuple[Row, ...]
  chunks: tuple[Chunk, ...]
  decode: np.ndarray  # [R, B, 3] int32 token, position (-1: idle), seed
  decode_temperature: np.ndarray  # [R, B] float32
  chunk: np.ndarray  # [R, C] int32
  chunk_fields: np.ndarray  # [R, 4] int32 start, length, row, seed
  chunk_temperature: np.ndarray  # [R] float32
  emitted: int = 0  # tokens emitted before this step
  retired: tuple[str, ...] = ()  # requests that ended since the last step

  @property
  def prefill_tokens(self) -> int:
    return sum(c.length for c in self.chunks)


class Emission(NamedTuple):
  """A token that leaves through the gateway."""

  request_id: str
  position: int
  token: int


class Finish(NamedTuple):
  """A request that is answered."""

  request_id: str
  reason: str  # stop or length
  tokens: int


def admit(state: SchedulerState) -> tuple[SchedulerState, tuple[str, ...]]:
  """Gives queued requests free rows, first come first served.

  The rank with most free rows takes the next one; ties go to the first in
  mesh order.
  """
  free = {rank: rows.count(None) for rank, rows in state.rows.items()}
  admitted = []
  for sequence in state.queued():
    rank = max(free, key=lambda r: free[r], default=-1)
    if rank < 0 or not free[rank]:
      break
    name = sequence.request.request_id
    state = place(state, name, rank, 0)
    free[rank] -= 1
    admitted.append(name)
  return state, tuple(admitted)


def schedule(
  state: SchedulerState,
  *,
  number: int,
  epoch: int,
  chunk: int,
  rows: int,
  mesh: tuple[int, ...] | None = None,
  held: Collection[str] = (),
) -> StepBatch | None:
  """The next step over the ranks of `mesh`; None: all idle.

  `mesh` is by default whom `state.rows` names; `held` requests sit it out.
  """
  mesh = tuple(state.rows) if mesh is None else mesh
  decoding: list[Row] = []
  chunks: list[Chunk] = []
  for place_, rank in enumerate(mesh):
    waiting: list[Sequence] = []
    for name in state.rows[rank]:
      if name is None or name in held:
        continue
      s = state.sequences[name]
      if s.known - s.computed <= SHORT_SUFFIX:
        samples = s.computed + 1 == s.known
        decoding.append(Row(place_, s.row, name, s.computed, samples))
      else:
        waiting.append(s)
    if waiting:
      first = min(waiting, key=lambda s: s.order)
      chunks.append(_chunk(place_, first, chunk))
  if not decoding and not chunks:
    return None
  return _batch(state, mesh, decoding, chunks, number, epoch, chunk, rows)


def _chunk(place_: int, s: Sequence, width: int) -> Chunk:
  length = min(width, s.known - s.computed)
  samples = s.computed + length == s.known
  name = s.request.request_id
  return Chunk(place_, s.row, name, s.computed, length, samples)


def _batch(
  state: SchedulerState,
  mesh: tuple[int, ...],
  decoding: list[Row],
  chunks: list[Chunk],
  number: int,
  epoch: int,
  chunk: int,
  rows: int,
) -> StepBatch:
  """Packs the choice into arrays."""
  r, width = len(mesh), chunk if chunks else 0
  decode = np.zeros((r, rows, 3), np.int32)
  decode[:, :, 1] = -1
  decode_temperature = np.zeros((r, rows), np.float32)
  for row in decoding:
    s = state.sequences[row.request_id]
    token = s.token(row.position)
    decode[row.place, row.row] = token, row.position, s.request.seed
    decode_temperature[row.place, row.row] = s.request.temperature
  tokens = np.zeros((r, width), np.int32)
  fields = np.zeros((r, 4), np.int32)
  chunk_temperature = np.zeros((r,), np.float32)
  for c in chunks:
    s = state.sequences[c.request_id]
    tokens[c.place, : c.length] = s.span(c.start, c.start + c.length)
    fields[c.place] = c.start, c.length, c.row, s.request.seed
    chunk_temperature[c.place] = s.request.temperature
  return StepBatch(
    number, epoch, mesh, width, tuple(decoding), tuple(chunks), decode,
    decode_temperature, tokens, fields, chunk_temperature, state.emitted,
  )  # fmt: skip


def complete(
  state: SchedulerState, batch: StepBatch, tokens: np.ndarray
) -> tuple[SchedulerState, tuple[Emission, ...], tuple[Finish, ...]]:
  """The state after a step that counts; `tokens` [R, B + 1] int32."""
  sequences = dict(state.sequences)
  emissions: list[Emission] = []
  finished: list[Finish] = []
  for row in batch.rows:
    token = int(tokens[row.place, row.row]) if row.samples else None
    _advance(sequences, row.request_id, 1, token, emissions, finished)
  for c in batch.chunks:
    token = int(tokens[c.place, -1]) if c.samples else None
    _advance(sequences, c.request_id, c.length, token, emissions, finished)
  state = dataclasses.replace(
    state, sequences=sequences, emitted=state.emitted + len(emissions)
  )
  if finished:
    state = drop(state, [f.request_id for f in finished])
  return state, tuple(emissions), tuple(finished)


def _advance(
  sequences: dict[str, Sequence],
  name: str,
  computed: int,
  token: int | None,
  emissions: list[Emission],
  finished: list[Finish],
) -> None:
  s = sequences[name]
  request = s.request
  emitted = s.tokens if token is None else (*s.tokens, token)
  sequences[name] = dataclasses.replace(
    s, tokens=emitted, computed=s.computed + computed
  )
  if token is None:
    return
  emissions.append(Emission(name, s.known, token))
  if token in request.stop:
    finished.append(Finish(name, "stop", len(emitted)))
  elif len(emitted) >= request.max_new_tokens:
    finished.append(Finish(name, "length", len(emitted)))


def refusal(request: Request, max_len: int, vocab_size: int) -> str | None:
  """Why a request can't be accepted; None: it can."""
  prompt, new = request.prompt, request.max_new_tokens
  if not prompt:
    return "the prompt is empty; at least 1 token"
  if new < 1:
    return f"max_new_tokens={new}; at least 1"
  if len(prompt) + new > max_len:
    return (
      f"{len(prompt)} prompt + {new} new tokens are longer than the cache's "
      f"{max_len} positions"
    )
  for token in prompt:
    if not 0 <= token < vocab_size:
      return f"token {token} is outside the vocabulary of {vocab_size}"
  return None
