"""A worker's KV checkpoints on their way to whoever mirrors them.

The step hands its delta over and goes on: whole when it is committed, or layer
by layer while it runs, with a commit record behind. What the holder can't take
in time is dropped, oldest first, and shows as a gap that the holder refuses:
nothing is lost by that but the checkpoint.

One thread owns the connection to a holder. It sends nothing while a flush is
unanswered, so no reply is unread while data is on its way: if the process is
killed then, the kernel still delivers the data instead of resetting the
connection.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from resilient_moe.runtime.process.layer_log import (
  Backlog,
  Commit,
  Drain,
  Forget,
  Item,
  Log,
  Rebase,
  Step,
)
from resilient_moe.runtime.process.link import Address, Link, dial
from resilient_moe.runtime.process.mirror import Segment

MAX_QUEUED = 256  # steps and rebases that were handed over
FLUSH_STEPS = 8  # a gap is known after so many steps,
FLUSH_IDLE_S = 0.02  # or when nothing more came for this long
PATIENCE_S = 0.05
POLL_S = 0.001  # of a link that nobody calls idle: less than its gaps
CONNECT_S = 10.0
CLOSE_S = 5.0

Idle = Callable[[], bool]


class KVStream:
  """Streams one rank's KV to a holder. No call blocks but `drain`, `close`.

  `target`, `close` and the rest are for one thread, the worker's; `wake` is
  for any.
  """

  def __init__(
    self, rank: int, authkey: bytes, warn: Callable[[str], None],
    idle: Idle | None = None, patience_s: float = PATIENCE_S,
  ) -> None:  # fmt: skip
    """What is streamed by whom, and when.

    Args:
      rank: The worker's.
      authkey: What the holders know.
      warn: Gets a sentence, mostly in the stream's own thread.
      idle: Whether the worker's link to the others has nothing else to carry,
        asked in the stream's own thread. KV waits until then; None: never.
      patience_s: The longest that it waits, since it was handed over.
    """
    self._rank = rank
    self._authkey = authkey
    self._warn = warn
    self._idle, self._patience_s = idle, patience_s
    self._holder: _Holder | None = None
    self._sent_before_bytes = 0

  @property
  def alive(self) -> bool:
    """Whether there is a holder that takes, or may yet take, what is sent."""
    return self._holder is not None and self._holder.alive

  @property
  def pending(self) -> int:
    """Steps handed over and not sent yet."""
    return self._holder.pending() if self._holder else 0

  @property
  def bytes_sent(self) -> int:
    """Of KV, to all holders so far."""
    now = self._holder.bytes_sent if self._holder else 0
    return self._sent_before_bytes + now

  def target(self, address: Address | None) -> None:
    """Streams there from now on; what is queued is dropped. None: nowhere."""
    self._sent_before_bytes = self.bytes_sent
    if self._holder is not None:
      self._holder.end()
    self._holder = address and _Holder(
      address, self._rank, self._authkey, self._warn, self._idle,
      self._patience_s,
    )  # fmt: skip

  def put(self, segments: Iterable[Segment], delta: Any) -> None:
    """Hands over a committed step.

    Args:
      segments: (request, first lane, first position, positions) each.
      delta: This rank's part, [L, 1, n, 2K, d]; anything numpy can read.
    """
    self._hand_over(Step(list(segments), delta))

  def log(
    self, segment_id: int, layer: int, data: Any,
    lanes: Sequence[int] | None = None,
  ) -> None:  # fmt: skip
    """Hands over one layer of a step that still runs.

    It counts once the step's `commit` has followed, and never if another
    target came between.

    Args:
      segment_id: The step's: larger than that of any before. A step that is
        aborted and run again has a new one.
      layer: Its number.
      data: The step's lanes, [n, 2K, d]; anything numpy can read, and left as
        it is until it is sent.
      lanes: Which of them are sent, the same for all layers; None: all.
    """
    self._hand_over(Log(segment_id, layer, data, lanes))

  def commit(self, segment_id: int, segments: Iterable[Segment]) -> None:
    """The logged step counts: hands over its commit record.

    Args:
      segment_id: The step's.
      segments: As of `put`; lanes are those of the `data` that was logged.
    """
    self._hand_over(Commit(segment_id, list(segments)))

  def wake(self) -> None:
    """The link is idle; without it, that is seen within a millisecond."""
    if (holder := self._holder) is not None:
      holder.wake()

  def rebase(self, request_id: str, kv: Any) -> None:
    """Hands over a request's whole KV, [L, 2K, tokens, d]."""
    self._hand_over(Rebase(request_id, kv))

  def forget(self, names: Iterable[str]) -> None:
    """The holder may drop these requests."""
    self._hand_over(Forget(list(names)))

  def drain(self, timeout_s: float) -> bool:
    """Waits; whether all that was handed over since the last has arrived.

    Also what the holder refused has arrived: see `take_refused`. False also if
    something was dropped on the way, or the time was over.
    """
    item = Drain()
    if not self._hand_over(item):
      return False
    item.awaited = item.done.wait(timeout_s)
    return item.awaited and item.arrived

  def take_refused(self) -> set[str]:
    """Requests with a gap at the holder, found since the last call."""
    return self._holder.take_refused() if self._holder else set()

  def close(self) -> None:
    """Ends the thread; what is queued is dropped."""
    holder = self._holder
    self.target(None)
    if holder is not None:
      holder.thread.join(CLOSE_S)

  def _hand_over(self, item: Item) -> bool:
    return self._holder is not None and self._holder.hand_over(item)


class _Holder:
  """The queue, the thread and the connection to one holder."""

  def __init__(
    self, address: Address, rank: int, authkey: bytes,
    warn: Callable[[str], None], idle: Idle | None, patience_s: float,
  ) -> None:  # fmt: skip
    self.alive = True
    self.bytes_sent = 0
    self._address = address
    self._rank = rank
    self._authkey = authkey
    self._warn = warn
    self._idle, self._patience_s = idle, patience_s
    self._warned: set[str] = set()
    self._changed = threading.Condition()  # guards what follows
    self._backlog = Backlog(MAX_QUEUED)
    self._refused: set[str] = set()
    self._link: Link | None = None
    self._sending: Item | None = None  # of a step; out, and not sent yet
    self._dropped = False  # something, since the last drain
    self._ended = False
    self.thread = threading.Thread(target=self._work, daemon=True)
    self.thread.start()

  # -- the worker's side

  def pending(self) -> int:
    with self._changed:
      partly = self._backlog.has(self._sending)  # it is counted there
      return self._backlog.steps() + (self._sending is not None and not partly)

  def wake(self) -> None:
    with self._changed:
      self._changed.notify()

  def take_refused(self) -> set[str]:
    with self._changed:
      refused, self._refused = self._refused, set()
    return refused

  def hand_over(self, item: Item) -> bool:
    """Queues it; False: the holder is gone, and it is dropped."""
    with self._changed:
      if not self.alive:
        return False
      full = self._backlog.add(item, time.monotonic())
      self._dropped |= full
      self._changed.notify()
    if full:
      self._warn_once("behind", f"are {MAX_QUEUED} steps behind, the oldest "
                      "are dropped: requests with a gap")  # fmt: skip
    return True

  def end(self) -> None:
    """Drops the queue and the connection, wherever the thread is."""
    with self._changed:
      self._ended = True
      self._give_up()
      if self._link is not None:  # the thread may be stuck in it
        self._link.shutdown()

  def _give_up(self) -> None:
    self.alive = False
    for drain in self._backlog.clear():
      drain.done.set()
    self._changed.notify()

  def _warn_once(self, kind: str, what: str) -> None:
    if kind not in self._warned:
      self._warned.add(kind)
      host, port = self._address
      self._warn(
        f"KV checkpoints to {host}:{port} {what} fall back to re-prefill"
      )

  # -- the thread

  def _work(self) -> None:
    try:
      self._stream()
    except Exception as error:  # noqa: BLE001 - degrade, and say so
      with self._changed:
        meant = self._ended
        self._give_up()
      if not meant:
        self._warn_once("stopped", f"stopped ({error!r}): requests")

  def _stream(self) -> None:
    link = dial(self._address, CONNECT_S)
    try:
      with self._changed:
        self._link = link
      if not self._ended:
        link.greet(self._authkey, asks_first=False)
        link.limit(0)
        link.send(["hello", self._rank])
      unflushed = 0
      while not self._ended:
        item = self._next(FLUSH_IDLE_S if unflushed else None)
        self._send(link, item)
        unflushed += isinstance(item, Step | Commit)
        if unflushed and (item is None or unflushed >= FLUSH_STEPS):
          self._flush(link)
          unflushed = 0
    finally:
      with self._changed:
        self._sending = None
        self._link = None
      link.close()

  def _next(self, wait_s: float | None) -> Item | None:
    """The next item, in its time; None: nothing came, or this is over."""
    with self._changed:
      self._sending = None
      ready = lambda: self._backlog or self._ended
      if not self._changed.wait_for(ready, wait_s) or self._ended:
        return None
      since_s, item = self._backlog.take()
      if isinstance(item, Step | Log | Commit):
        self._sending = item
    if isinstance(item, Step | Log | Rebase):
      self._hold_back(since_s + self._patience_s)
      return None if self._ended else item
    return item

  def _hold_back(self, until_s: float) -> None:
    """Waits for the link, until a moment at most.

    The moment counts from when an item was handed over: what is behind it
    doesn't wait anew, so the lag stays what it is on a link that is never idle.
    """
    while self._idle is not None and not (self._ended or self._idle()):
      left_s = until_s - time.monotonic()
      if left_s <= 0:
        return
      with self._changed:
        self._changed.wait(min(left_s, POLL_S))

  def _send(self, link: Link, item: Item | None) -> None:
    match item:
      case Step(segments, delta):
        self._send_step(link, segments, delta)
      case Log():
        self._send_log(link, item)
      case Commit(number, segments):
        link.send(["commit", number, segments])
      case Rebase(name, kv):
        with self._changed:
          self._refused.discard(name)
        kv = np.asarray(kv)
        link.send(["rebase", name], [kv])
        self.bytes_sent += kv.nbytes
      case Forget(names):
        with self._changed:
          self._refused.difference_update(names)
        link.send(["forget", names])
      case Drain():
        try:
          self._flush(link)
          with self._changed:
            item.arrived = not self._dropped
            self._dropped &= not item.awaited
        finally:
          item.done.set()

  def _send_step(self, link: Link, segments: list[Segment], delta: Any) -> None:
    """Sends the lanes that the segments name, not the idle ones."""
    packed: list[Segment] = []
    lanes: list[int] = []
    for name, lane, start, length in segments:
      packed.append((name, len(lanes), start, length))
      lanes += range(lane, lane + length)
    data = self._read(lambda: np.take(np.asarray(delta)[:, 0], lanes, axis=1))
    if data is not None:
      link.send(["put", packed], [data])
      self.bytes_sent += data.nbytes

  def _send_log(self, link: Link, log: Log) -> None:
    """Sends a layer; if it can't be read, its step will be refused."""
    lanes = None if log.lanes is None else [int(lane) for lane in log.lanes]
    some = slice(None) if lanes is None else lanes
    data = self._read(lambda: np.asarray(log.data)[some])
    if data is not None:
      link.send(["log", log.segment_id, log.layer, lanes], [data])
      self.bytes_sent += data.nbytes

  def _read(self, read: Callable[[], np.ndarray]) -> np.ndarray | None:
    try:
      return read()
    except Exception as error:  # noqa: BLE001 - degrade, and say so
      with self._changed:
        self._dropped = True
      self._warn_once("unread", f"left out a step ({error!r}): its requests")
      return None

  def _flush(self, link: Link) -> None:
    """Waits until all that was sent is in the mirror; asks what was not."""
    link.send(["flush", 0])
    _, _, refused = link.receive()
    with self._changed:
      self._refused.update(refused)
