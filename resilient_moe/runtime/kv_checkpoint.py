"""Incremental KV checkpoints: step deltas streamed off the rank.

The delta of a committed step is exactly the segment to be stored (Tarragon,
section on asynchronous incremental checkpoints), so nothing is read back from
the cache. A thread copies each delta into a mirror and only then moves the
request's commit record forward, so that a restore never sees half a segment.
`peer`: the mirror counts as memory of the next rank in the mesh and is lost
with it; `host`: it is the host's.
"""

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from resilient_moe.serving.scheduler import StepBatch

MODES = ("none", "peer", "host")


class Record(NamedTuple):
  """The commit record of a request: what a restore may use."""

  tokens: int  # positions [0, tokens) are whole
  holder: int  # rank whose memory it counts as; -1: the host's
  entry: int  # its place in the mirror


class Segment(NamedTuple):
  """One run of positions of one request in a step's delta."""

  request_id: str
  place: int  # rank's position in the mesh
  rank: int
  lane: int  # first lane of the delta
  start: int
  length: int
  holder: int


class KVCheckpointer:
  """Mirrors of the KV of every request in flight."""

  def __init__(
    self, mode: str, request_shape: tuple[int, ...], dtype: str, capacity: int,
    warn: Callable[[str], None], by_step: bool = False,
  ) -> None:  # fmt: skip
    """`request_shape` is a request's KV, [L, 2K, T, d]; `capacity` requests.

    `by_step`: a step's segments are stored before the next step, as in a
    simulation that counts steps, instead of whenever the thread gets to it.
    """
    if mode not in MODES:
      raise ValueError(
        f"checkpoint={mode!r}: choose one of {', '.join(MODES)}"
      )
    self.mode = mode
    self._by_step = by_step
    # Ranks that mirror, each for the one before; (): those of the batch.
    self.ring: tuple[int, ...] = ()
    self.nbytes_streamed = 0
    self._warn = warn
    self._records: dict[str, Record] = {}
    self._free = list(range(capacity))[::-1]
    # Pages of the mirror are touched, and so allocated, as they are filled.
    self._mirror = np.zeros((capacity, *request_shape), dtype)
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._pending = 0
    self._dead: set[int] = set()
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  @property
  def reserved_bytes(self) -> int:
    return self._mirror.nbytes

  def records(self) -> dict[str, tuple[int, int]]:
    """Request -> (positions committed, holder)."""
    with self._lock:
      return {n: (r.tokens, r.holder) for n, r in self._records.items()}

  def lag_steps(self) -> int:
    """Steps that were committed but not mirrored yet."""
    return self._pending

  def stream(
    self, batch: StepBatch, delta: jax.Array, row_count: int
  ) -> None:
    """Hands a committed step to the thread; never waits for it."""
    with self._lock:  # the thread counts down
      self._pending += 1
    ring = self.ring or batch.mesh
    self._queue.put((batch, delta, row_count, ring))
    if self._by_step:
      self.drain()

  def holder(self, ring: tuple[int, ...], place: int) -> int:
    """Who mirrors for the rank at `place`: the next in the ring, or the host.

    A single rank has no neighbour: its mirror is the host's.
    """
    if self.mode == "host" or len(ring) == 1:
      return -1
    return ring[(place + 1) % len(ring)]

  def restore(self, request_id: str) -> np.ndarray | None:
    """The committed KV of a request, [L, 2K, tokens, d]; None: nothing."""
    with self._lock:
      record = self._records.get(request_id)
    if record is None or not record.tokens:
      return None
    return self._mirror[record.entry][:, :, : record.tokens]

  def rebase(self, request_id: str, kv: np.ndarray, holder: int) -> None:
    """Stores a request's whole KV anew (its last holder is gone)."""
    self.drain()
    record = self._record(request_id, holder)
    if record is not None:
      tokens = kv.shape[2]
      self._mirror[record.entry][:, :, :tokens] = kv
      self._commit(request_id, record._replace(tokens=tokens, holder=holder))

  def forget_rank(self, rank: int) -> None:
    """The rank is dead: what it mirrored, and what it had not sent yet."""
    with self._lock:
      self._dead.add(rank)
    self.drain()
    with self._lock:
      lost = [n for n, r in self._records.items() if r.holder == rank]
    for name in lost:
      self._forget(name)

  def remember_rank(self, rank: int) -> None:
    """A replacement of this rank serves."""
    with self._lock:
      self._dead.discard(rank)

  def drain(self) -> None:
    """Waits until every segment handed over is stored."""
    done = threading.Event()
    self._queue.put(done)
    done.wait()

  def close(self) -> None:
    self._queue.put(None)
    self._thread.join()

  def _work(self) -> None:
    while (item := self._queue.get()) is not None:
      if isinstance(item, threading.Event):
        item.set()
        continue
      try:
        self._store(*item)
      except Exception as error:  # noqa: BLE001 - degrade, and say so
        self._warn(f"KV checkpoint stopped for a step: {error!r}")
      with self._lock:
        self._pending -= 1

  def _store(
    self, batch: StepBatch, delta: jax.Array, row_count: int,
    ring: tuple[int, ...],
  ) -> None:  # fmt: skip
    """Copies a step's segments, then moves the commit records forward."""
    for name in batch.retired:
      self._forget(name)
    data = np.asarray(delta)  # [L, R, B + C, 2K, d]
    each = self._segments(batch, row_count, ring)
    usable = [(s, r) for s in each if (r := self._usable(s)) is not None]
    self._copy_rows(data, [u for u in usable if u[0].length == 1])
    for s, record in usable:
      if s.length > 1:
        lanes = data[:, s.place, s.lane : s.lane + s.length]
        at = slice(s.start, s.start + s.length)
        self._mirror[record.entry][:, :, at] = np.swapaxes(lanes, 1, 2)
    with self._lock:
      for s, record in usable:
        holder = s.holder if s.start == 0 else record.holder
        whole = s.start + s.length
        self._records[s.request_id] = Record(whole, holder, record.entry)
    position_bytes = data[:, 0, 0].nbytes
    self.nbytes_streamed += position_bytes * sum(s.length for s, _ in usable)

  def _segments(
    self, batch: StepBatch, row_count: int, ring: tuple[int, ...]
  ) -> list[Segment]:
    """What the lanes of a delta are; a chunk lies behind the rows."""
    mesh = batch.mesh
    holders = [self.holder(ring, ring.index(rank)) for rank in mesh]
    rows = [
      Segment(r.request_id, r.place, mesh[r.place], r.row, r.position, 1,
              holders[r.place])
      for r in batch.rows
    ]  # fmt: skip
    chunks = [
      Segment(c.request_id, c.place, mesh[c.place], row_count, c.start,
              c.length, holders[c.place])
      for c in batch.chunks
    ]  # fmt: skip
    return rows + chunks

  def _usable(self, s: Segment) -> Record | None:
    """The record that a segment continues; None: it can't be stored."""
    if s.rank in self._dead:
      return None  # a delta that lay in the dead rank's memory
    record = self._record(s.request_id, s.holder)
    if record is None or s.start > record.tokens:
      return None  # no room, or a gap: `rebase` fills it
    return record

  def _copy_rows(
    self, data: np.ndarray, rows: list[tuple[Segment, Record]]
  ) -> None:
    """All decoded positions in one assignment."""
    if not rows:
      return
    at = np.array([(s.place, s.lane, r.entry, s.start) for s, r in rows])
    place, lane, entry, position = at.T
    new = np.moveaxis(data[:, place, lane], 1, 0)  # [n, L, 2K, d]
    self._mirror[entry, :, :, position] = new

  def _record(self, request_id: str, holder: int) -> Record | None:
    with self._lock:
      if request_id not in self._records:
        if not self._free:
          self._warn(f"no room to checkpoint request {request_id!r}")
          return None
        self._records[request_id] = Record(0, holder, self._free.pop())
      return self._records[request_id]

  def _commit(self, request_id: str, record: Record) -> None:
    with self._lock:
      self._records[request_id] = record

  def _forget(self, request_id: str) -> None:
    with self._lock:
      record = self._records.pop(request_id, None)
      if record is not None:
        self._free.append(record.entry)
