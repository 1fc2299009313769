"""A crew that only notes, and copies over it, for tests of `KVCopies`."""

import time
import types
from collections.abc import Callable, Mapping
from typing import Any

from resilient_moe.runtime.process.kv_copies import KVCopies
from resilient_moe.runtime.process.mate import Answers
from resilient_moe.runtime.process.stores import Stores
from resilient_moe.serving.scheduler import Row

KEY = b"key of a test"
ROWS = 2
SHAPE = (2, 2, 32, 8)  # of a request's KV
MESH = (0, 1, 2)
Each = Mapping[int, Mapping[str, Any]]


class Crew:
  """Ranks that do nothing; what they were told and asked is kept."""

  authkey = KEY

  def __init__(self, *ranks: int) -> None:
    self.there = set(ranks)
    self.fenced: set[int] = set()
    self.told: list[tuple[str, int, dict]] = []
    self.asked: list[tuple[str, int, dict]] = []
    self.mirrors: dict[int, dict[str, int]] = {}
    self.rows: dict[str, tuple[int, int, str]] = {}

  def alive(self, rank: int) -> bool:
    return rank in self.there

  is_up = alive

  def up_ranks(self) -> tuple[int, ...]:
    return tuple(sorted(self.there))

  def lingers(self, rank: int) -> bool:
    return rank in self.fenced

  def mate(self, rank: int) -> Any:
    up = types.SimpleNamespace(data=address(rank))
    return types.SimpleNamespace(up=up)

  def tell(self, each: Each, op: str) -> None:
    self.told += [(op, r, dict(args)) for r, args in each.items()]

  def call(self, each: Each, op: str) -> Answers:
    self.asked += [(op, r, dict(args)) for r, args in each.items()]
    answer = {"records": self._records, "rows": self._rows}
    values = {
      r: answer.get(op, lambda *_: 0)(r, args) for r, args in each.items()
    }
    return Answers(values, {}, ())

  def _records(self, rank: int, args: Mapping[str, Any]) -> dict[str, int]:
    return self.mirrors.get(rank, {})

  def _rows(self, rank: int, args: Mapping[str, Any]) -> list:
    return [
      (row["request_id"], *self.rows.get(row["request_id"], (7, 70, "")))
      for row in args["rows"]
    ]

  def take(self, op: str) -> dict[int, dict]:
    """What ranks were told of a kind since the last time."""
    found = {r: args for kind, r, args in self.told if kind == op}
    self.told = [t for t in self.told if t[0] != op]
    return found


class Copies(KVCopies):
  """With the warnings that it wrote."""

  def __init__(
    self, mode: str, crew: Crew, stores: Stores | None = None
  ) -> None:
    self.warnings: list[str] = []
    self.sums: list[dict[str, Any]] = []
    super().__init__(mode, crew, stores, ROWS, self._note)  # type: ignore

  def _note(self, event: str, **fields: Any) -> None:
    if event == "warning":
      self.warnings.append(fields["text"])
    else:
      self.sums.append({"event": event, **fields})


def address(rank: int) -> tuple[str, int]:
  return "127.0.0.1", 1000 + rank


def batch(
  *rows: tuple[int, int, str, int], mesh: Any = MESH, **more: Any
) -> Any:
  """Decode rows (place, row, request, position) of a step."""
  decoding = tuple(Row(*r, samples=True) for r in rows)
  fields = {"chunks": (), "retired": (), **more}
  return types.SimpleNamespace(mesh=mesh, rows=decoding, **fields)


def serve(copies: KVCopies, *args: Any, **kwargs: Any) -> None:
  """A step that counts."""
  step = batch(*args, **kwargs)
  copies.seats(step)
  copies.committed(step)


def rebased(copies: KVCopies, crew: Crew) -> dict[str, tuple[int, int, int]]:
  """What is streamed anew: request -> rank, row, tokens."""
  for _ in range(9):
    copies.rebase_one()
  told = [(r, a) for op, r, a in crew.told if op == "rebase"]
  crew.take("rebase")
  return {a["request_id"]: (r, a["row"], a["tokens"]) for r, a in told}


def targets(crew: Crew) -> dict[int, Any]:
  return {r: a["address"] for r, a in crew.take("stream_to").items()}


def until(there: Callable[[], Any]) -> None:
  give_up = time.monotonic() + 30
  while not there():
    assert time.monotonic() < give_up
    time.sleep(0.005)


def keep(
  copies: Copies, stores: Stores, i: int, records: dict[str, int]
) -> None:
  """As if a store had been streamed this."""
  client = copies._client(stores.addresses()[i])
  client.records = lambda *_: records  # type: ignore[method-assign]
