"""Who mirrors whose KV, and how it comes back: the supervisor's side.

Workers stream to each other or to the store process (`stream.py`,
`kv_store.py`); here is only what is known about it. Any copy of a request's KV
is a prefix of it (positions never change), so the longest one serves.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from resilient_moe.recovery.view import Tier
from resilient_moe.runtime.process.crew import Crew
from resilient_moe.runtime.process.data import DRAIN_S, DataClient
from resilient_moe.runtime.process.mate import WorkerFailed
from resilient_moe.runtime.process.stores import Stores
from resilient_moe.runtime.process.wire import Address
from resilient_moe.serving.backend import Placed
from resilient_moe.serving.carry import Record
from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.serving.seats import Seats

STORE_S = 3.0  # for a store to answer: everybody waits
HOST = -1  # holder of what the store process mirrors


class _Copy(NamedTuple):
  """A copy of a request's KV; the longest one is the largest."""

  tokens: int
  holder: int
  address: Address


class KVCopies:
  """Mirrors of the KV of every request in flight, or none at all."""

  def __init__(
    self, mode: str, crew: Crew, stores: Stores | None, rows: int,
    record: Record,
  ) -> None:  # fmt: skip
    """`mode`: none, peer or host (with `stores`); `rows` of a rank."""
    self.mode = mode
    self._crew, self._stores, self._rows = crew, stores, rows
    self._record = record
    self._clients: dict[Address, DataClient] = {}
    self._seats = Seats()
    self._holder: dict[int, int] = {}  # rank -> who mirrors it
    self._known: dict[str, _Copy] = {}
    self._ended: list[int] = []  # died since the records were last read
    self._rebase: collections.deque[str] = collections.deque()
    self._lag = 0

  # -- steps

  def seats(self, batch: StepBatch) -> None:
    self._seats.note(batch, committed=False)

  def committed(self, batch: StepBatch) -> None:
    self._seats.note(batch, committed=True)

  def sitting_on(self, ranks: Iterable[int]) -> list[str]:
    return self._seats.on(ranks)

  def segments(self, batch: StepBatch) -> dict[int, list[tuple]]:
    """By rank: (request, lane of the delta, start, length)."""
    found: dict[int, list[tuple]] = {}
    if self.mode == "none":
      return found
    for r in batch.rows:
      segment = (r.request_id, r.row, r.position, 1)
      found.setdefault(batch.mesh[r.place], []).append(segment)
    for c in batch.chunks:
      segment = (c.request_id, self._rows, c.start, c.length)
      found.setdefault(batch.mesh[c.place], []).append(segment)
    return found

  def heard(
    self, rank: int, refused: Iterable[str], lag: int, warnings: Iterable[str]
  ) -> None:
    """What a worker said about its stream."""
    self._rebase.extend(n for n in refused if n not in self._rebase)
    self._lag = lag
    holder = self._holder.get(rank)
    for text in warnings:
      # That a peer died is known, and another mirrors by now.
      if holder == HOST:
        self._record("warning", text=text)

  # -- who mirrors whom

  def ring(self, mesh: tuple[int, ...]) -> None:
    """Each rank streams to the next one, or all to the store."""
    if self.mode == "none":
      return
    for place, rank in enumerate(mesh):
      holder = mesh[(place + 1) % len(mesh)] if self.mode == "peer" else HOST
      if self._holder.get(rank) == holder:
        continue
      self._holder[rank] = holder
      self._stream(rank, self._address(holder, rank))

  def _stream(self, rank: int, address: Address | None) -> None:
    """A rank's KV goes there from now on, and what it has so far too."""
    self._crew.tell({rank: {"address": address}}, "stream_to")
    self._rebase.extend(self._seats.on([rank]))

  def _address(self, holder: int, rank: int) -> Address | None:
    """Where a holder takes streams; a single rank has no neighbour."""
    if holder == HOST:
      return self._stores.retarget(rank) if self._stores is not None else None
    if holder == rank or not self._crew.alive(holder):
      return None
    up = self._crew.mate(holder).up
    return up.data if up is not None else None

  def look(self) -> None:
    """A store that died is replaced by another, if one is left."""
    if self._stores is None:
      return
    for dead in self._stores.lost():
      ranks = [r for r in self._stores.ranks_of(dead) if r in self._holder]
      left = len(self._stores.alive())
      what = "stream to another" if left else "are prefilled when they move"
      self._warn(f"KV store {dead} is gone: requests of ranks {ranks} {what}")
      for rank in ranks if left else ():
        self._stream(rank, self._stores.retarget(rank))

  def lost(self, ranks: Iterable[int]) -> None:
    """Ranks that are gone: what the dead ones sent ends, and is awaited."""
    for rank in ranks:
      self._holder.pop(rank, None)
      if not self._crew.lingers(rank):
        self._ended.append(rank)
    gone = set(ranks)
    self._holder = {r: h for r, h in self._holder.items() if h not in gone}

  def moved(self, placed: tuple[Placed, ...]) -> None:
    """Requests that have new places stream anew from there."""
    for p in placed:
      self._seats.moved(p)
      if self.mode != "none":
        self._rebase.append(p.request_id)

  def rebase_one(self) -> None:
    """Streams one request's whole KV to its rank's holder."""
    if not self._rebase:
      return
    name = self._rebase.popleft()
    seat = self._seats.get(name)
    if seat is not None and seat.tokens and self._crew.alive(seat.rank):
      call = {"request_id": name, "row": seat.row, "tokens": seat.tokens}
      self._crew.tell({seat.rank: call}, "rebase")

  # -- after a loss

  def records(self) -> Mapping[str, tuple[int, int]]:
    """Request -> (positions mirrored, holder), all that the dead sent read."""
    if self.mode == "none":
      return {}
    ended, self._ended = self._ended, []
    known: dict[str, _Copy] = {}
    for holder, address, records in self._ask(ended):
      for name, tokens in records.items():
        copy = _Copy(tokens, holder, address)
        known[name] = max(known.get(name, copy), copy)
    self._known = known
    return {name: (c.tokens, c.holder) for name, c in known.items()}

  def _ask(
    self, ended: list[int]
  ) -> list[tuple[int, Address, dict[str, int]]]:
    """(holder, its address, what it keeps) of everybody who says so."""
    if self.mode == "peer":
      ranks = self._crew.up_ranks()
      answers = self._crew.call({r: {"ended": ended} for r in ranks}, "records")
      for rank, error in answers.errors.items():
        self._warn(f"rank {rank} can't say what it mirrors: {error}")
      found = []
      for rank, records in answers.values.items():
        if (address := self._address(rank, HOST)) is not None:
          found.append((rank, address, records))
      return found
    assert self._stores is not None
    return [
      (HOST, address, self._stored(store, address, ended))
      for store, address in self._stores.addresses().items()
    ]

  def _stored(
    self, store: int, address: Address, ended: list[int]
  ) -> dict[str, int]:
    """What a store keeps; one that doesn't say so holds nobody up again."""
    assert self._stores is not None
    try:
      client = self._client(address)
      for rank in ended:
        client.streams_ended(rank, DRAIN_S, STORE_S)
      return client.records(STORE_S)
    except ConnectionError as error:
      self._warn(f"KV store {store} is given up, requests are prefilled: "
                 f"{error}")  # fmt: skip
      self._clients.pop(address).close()
      self._stores.kill(store)
      return {}

  def _client(self, address: Address) -> DataClient:
    if address not in self._clients:
      self._clients[address] = DataClient(address, self._crew.authkey)
    return self._clients[address]

  def restore(
    self, placed: tuple[Placed, ...], tier: Tier, alive: np.ndarray
  ) -> tuple[dict[str, int], int]:
    """Every target pulls its own requests' KV, all side by side."""
    calls: dict[int, list[dict[str, Any]]] = {}
    settle: set[int] = set()
    for p in placed:
      source = self._source(p, tier, alive, settle)
      if source is not None:
        calls.setdefault(p.rank, []).append(
          {"request_id": p.request_id, "row": p.row, **source}
        )
    if settle:  # a commit may be under way there
      self._crew.call(dict.fromkeys(settle, {}), "done").good()
    answers = self._crew.call(
      {rank: {"rows": rows} for rank, rows in calls.items()}, "rows"
    )
    restored, nbytes = {}, 0
    for said in answers.good().values():
      for name, tokens, size, error in said:
        if error:
          self._warn(f"request {name!r} is prefilled again: {error}")
        else:
          restored[name] = tokens
          nbytes += size
    return restored, nbytes

  def _source(
    self, p: Placed, tier: Tier, alive: np.ndarray, settle: set[int]
  ) -> dict[str, Any] | None:
    """Where a request's KV can be pulled from, and how."""
    live = tier == Tier.PEER and p.from_rank >= 0 and alive[p.from_rank]
    if live and self._crew.alive(p.from_rank):
      up = self._crew.mate(p.from_rank).up
      assert up is not None
      settle.add(p.from_rank)
      args = (p.from_row, p.live_tokens)
      return {"what": "row", "address": up.data, "args": args}
    copy = self._known.get(p.request_id)
    if copy is None or not copy.tokens:
      return None
    return {"what": "kv", "address": copy.address, "args": (p.request_id,)}

  def _warn(self, text: str) -> None:
    self._record("warning", text=text)

  def close(self, mesh: tuple[int, ...]) -> None:
    """Records what streaming came to; ends the store process."""
    try:
      if self.mode != "none":
        present: dict[int, dict] = {r: {} for r in mesh if self._crew.alive(r)}
        total = sum(self._crew.call(present, "done").values.values())
        self._record("checkpoint", bytes_total=total, lag_steps=self._lag)
    except WorkerFailed as error:
      self._warn(f"no count of streamed bytes: {error}")
    finally:
      for client in self._clients.values():
        client.close()
      if self._stores is not None:
        self._stores.close()
