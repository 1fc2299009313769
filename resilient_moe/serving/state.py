"""The scheduler's state, as a value: adopted on commit, dropped on failure.

All functions are pure; a step that fails leaves the state before it in
place, which undoes block tables and queues alike (DESIGN 2.2).
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from resilient_moe.recovery.view import RequestTable
from resilient_moe.serving.request import Request, Sequence

Rows = tuple[str | None, ...]  # who holds each KV slot of a rank


@dataclasses.dataclass(frozen=True)
class SchedulerState:
  """Every request that was accepted and not answered yet."""

  sequences: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
  rows: Mapping[int, Rows] = dataclasses.field(default_factory=dict)
  accepted: int = 0  # requests ever accepted; gives the order
  emitted: int = 0  # tokens ever emitted

  def queued(self) -> list[Sequence]:
    """Requests without a row, first accepted first."""
    waiting = (s for s in self.sequences.values() if s.rank < 0)
    return sorted(waiting, key=lambda s: s.order)


@dataclasses.dataclass
class Current:
  """The state that counts now: steps may end while an action is waited for."""

  state: SchedulerState


def with_ranks(
  state: SchedulerState,
  mesh: Iterable[int],
  rows_per_rank: int,
  lost: Iterable[int] = (),
) -> SchedulerState:
  """Rows for exactly the ranks of the mesh.

  Who sits elsewhere takes part in no step, but keeps the seat, so that a plan
  can still see and hand over its KV; on a `lost` rank there is none.
  """
  seats: dict[int, list[str | None]] = {
    int(r): [None] * rows_per_rank for r in mesh
  }
  gone = {int(r) for r in lost}
  sequences = dict(state.sequences)
  for name, s in state.sequences.items():
    if s.rank in seats:
      seats[s.rank][s.row] = name
    if s.rank in gone:
      sequences[name] = dataclasses.replace(s, computed=0)
  rows = {rank: tuple(names) for rank, names in seats.items()}
  return dataclasses.replace(state, rows=rows, sequences=sequences)


def accept(
  state: SchedulerState, request: Request, tokens: tuple[int, ...] = ()
) -> SchedulerState:
  """Adds a request to the queue; `tokens` were emitted by an earlier engine."""
  name = request.request_id
  if name in state.sequences:
    raise ValueError(f"request {name!r} is in flight already")
  sequence = Sequence(request, state.accepted, tokens)
  return dataclasses.replace(
    state,
    sequences={**state.sequences, name: sequence},
    accepted=state.accepted + 1,
  )


def place(
  state: SchedulerState, request_id: str, rank: int, computed: int
) -> SchedulerState:
  """Moves a request into a free row of `rank`, `computed` positions held.

  Raises:
    ValueError: the rank has no free row.
  """
  state = unplace(state, [request_id])
  rows = state.rows.get(rank, ())
  if None not in rows:
    raise ValueError(
      f"request {request_id!r}: rank {rank} has no free row of {len(rows)}"
    )
  row = rows.index(None)
  moved = dataclasses.replace(
    state.sequences[request_id], rank=rank, row=row, computed=computed
  )
  return dataclasses.replace(
    state,
    sequences={**state.sequences, request_id: moved},
    rows={**state.rows, rank: rows[:row] + (request_id,) + rows[row + 1 :]},
  )


def unplace(state: SchedulerState, names: Iterable[str]) -> SchedulerState:
  """Back to the queue, tokens kept."""
  names = [n for n in names if state.sequences[n].rank >= 0]
  moved = {n: _unplaced(state.sequences[n]) for n in names}
  return dataclasses.replace(
    state,
    sequences={**state.sequences, **moved},
    rows=_without(state.rows, set(names)),
  )


def drop(state: SchedulerState, names: Iterable[str]) -> SchedulerState:
  """Removes requests that are answered or ended."""
  gone = set(names)
  kept = {n: s for n, s in state.sequences.items() if n not in gone}
  return dataclasses.replace(
    state, sequences=kept, rows=_without(state.rows, gone)
  )


def request_table(
  state: SchedulerState, checkpoints: Mapping[str, tuple[int, int]]
) -> RequestTable:
  """What a policy sees of the requests.

  Args:
    state: the scheduler's state.
    checkpoints: request -> (positions committed, rank that holds them or -1).
  """
  each = sorted(state.sequences.values(), key=lambda s: s.order)
  names = tuple(s.request.request_id for s in each)
  saved = [checkpoints.get(name, (0, -1)) for name in names]

  def column(values: Iterable[int]) -> np.ndarray:
    array = np.fromiter(values, np.int32, len(each))
    array.setflags(write=False)
    return array

  return RequestTable(
    request_id=names,
    rank=column(s.rank for s in each),
    prompt_tokens=column(len(s.request.prompt) for s in each),
    emitted_tokens=column(len(s.tokens) for s in each),
    kv_tokens=column(s.computed for s in each),
    checkpoint_tokens=column(tokens for tokens, _ in saved),
    checkpoint_rank=column(rank for _, rank in saved),
  )


def _unplaced(sequence: Sequence) -> Sequence:
  return dataclasses.replace(sequence, rank=-1, row=-1, computed=0)


def _without(rows: Mapping[int, Rows], gone: set[str]) -> dict[int, Rows]:
  return {
    rank: tuple(None if name in gone else name for name in names)
    if gone.intersection(names)
    else names
    for rank, names in rows.items()
  }
