"""A worker's KV checkpoints on their way to whoever mirrors them.

The step hands its delta over and goes on. What the holder can't take in time
is dropped, oldest first, and shows as a gap that the holder refuses: nothing is
lost by that but the checkpoint.

One thread owns the connection to a holder. It sends nothing while a flush is
unanswered, so no reply is unread while data is on its way: if the process is
killed then, the kernel still delivers the data instead of resetting the
connection.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from resilient_moe.runtime.process.link import Address, Link, dial
from resilient_moe.runtime.process.mirror import Segment

MAX_QUEUED = 256  # steps and whatever else was handed over
FLUSH_STEPS = 8  # a gap is known after so many steps,
FLUSH_IDLE_S = 0.02  # or when nothing more came for this long
CONNECT_S = 10.0
CLOSE_S = 5.0


class _Step(NamedTuple):
  segments: list[Segment]
  delta: Any  # [L, 1, n, 2K, d]


class _Rebase(NamedTuple):
  request_id: str
  kv: Any  # [L, 2K, tokens, d]


class _Forget(NamedTuple):
  names: list[str]


class _Drain:
  """Set when what was handed over before it has arrived, or can't any more."""

  def __init__(self) -> None:
    self.done = threading.Event()
    self.awaited = True  # else it may not answer for what was dropped
    self.arrived = False


_Item = _Step | _Rebase | _Forget | _Drain


class KVStream:
  """Streams one rank's KV to a holder. No call blocks but `drain`, `close`.

  `target`, `close` and the rest are for one thread, the worker's.
  """

  def __init__(
    self, rank: int, authkey: bytes, warn: Callable[[str], None]
  ) -> None:
    """`warn` gets a sentence, mostly in the stream's own thread."""
    self._rank = rank
    self._authkey = authkey
    self._warn = warn
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
      address, self._rank, self._authkey, self._warn
    )

  def put(self, segments: Iterable[Segment], delta: Any) -> None:
    """Hands over a committed step.

    Args:
      segments: (request, first lane, first position, positions) each.
      delta: This rank's part, [L, 1, n, 2K, d]; anything numpy can read.
    """
    self._hand_over(_Step(list(segments), delta))

  def rebase(self, request_id: str, kv: Any) -> None:
    """Hands over a request's whole KV, [L, 2K, tokens, d]."""
    self._hand_over(_Rebase(request_id, kv))

  def forget(self, names: Iterable[str]) -> None:
    """The holder may drop these requests."""
    self._hand_over(_Forget(list(names)))

  def drain(self, timeout_s: float) -> bool:
    """Waits; whether all that was handed over since the last has arrived.

    Also what the holder refused has arrived: see `take_refused`. False also if
    something was dropped on the way, or the time was over.
    """
    item = _Drain()
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

  def _hand_over(self, item: _Item) -> bool:
    return self._holder is not None and self._holder.hand_over(item)


class _Holder:
  """The queue, the thread and the connection to one holder."""

  def __init__(
    self, address: Address, rank: int, authkey: bytes,
    warn: Callable[[str], None],
  ) -> None:  # fmt: skip
    self.alive = True
    self.bytes_sent = 0
    self._address = address
    self._rank = rank
    self._authkey = authkey
    self._warn = warn
    self._warned: set[str] = set()
    self._changed = threading.Condition()  # guards what follows
    self._queue: deque[_Item] = deque()
    self._refused: set[str] = set()
    self._link: Link | None = None
    self._sending = False  # a step is out of the queue and not sent yet
    self._dropped = False  # something, since the last drain
    self._ended = False
    self.thread = threading.Thread(target=self._work, daemon=True)
    self.thread.start()

  # -- the worker's side

  def pending(self) -> int:
    with self._changed:
      return self._sending + sum(isinstance(i, _Step) for i in self._queue)

  def take_refused(self) -> set[str]:
    with self._changed:
      refused, self._refused = self._refused, set()
    return refused

  def hand_over(self, item: _Item) -> bool:
    """Queues it; False: the holder is gone, and it is dropped."""
    with self._changed:
      if not self.alive:
        return False
      full = len(self._queue) >= MAX_QUEUED and self._drop_oldest()
      self._queue.append(item)
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

  def _drop_oldest(self) -> bool:
    for i, item in enumerate(self._queue):
      if isinstance(item, _Step | _Rebase):
        del self._queue[i]
        self._dropped = True
        return True
    return False  # only what takes no room

  def _give_up(self) -> None:
    self.alive = False
    for item in self._queue:
      if isinstance(item, _Drain):
        item.done.set()
    self._queue.clear()
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
        unflushed += isinstance(item, _Step)
        if unflushed and (item is None or unflushed >= FLUSH_STEPS):
          self._flush(link)
          unflushed = 0
    finally:
      with self._changed:
        self._sending = False
        self._link = None
      link.close()

  def _next(self, wait_s: float | None) -> _Item | None:
    """The next item; None: nothing came, or this is over."""
    with self._changed:
      self._sending = False
      ready = lambda: self._queue or self._ended
      if not self._changed.wait_for(ready, wait_s) or self._ended:
        return None
      item = self._queue.popleft()
      self._sending = isinstance(item, _Step)
      return item

  def _send(self, link: Link, item: _Item | None) -> None:
    match item:
      case _Step(segments, delta):
        self._send_step(link, segments, delta)
      case _Rebase(name, kv):
        with self._changed:
          self._refused.discard(name)
        kv = np.asarray(kv)
        link.send(["rebase", name], [kv])
        self.bytes_sent += kv.nbytes
      case _Forget(names):
        with self._changed:
          self._refused.difference_update(names)
        link.send(["forget", names])
      case _Drain():
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
    try:
      data = np.take(np.asarray(delta)[:, 0], lanes, axis=1)
    except Exception as error:  # noqa: BLE001 - degrade, and say so
      with self._changed:
        self._dropped = True
      self._warn_once("unread", f"left out a step ({error!r}): its requests")
      return
    link.send(["put", packed], [data])
    self.bytes_sent += data.nbytes

  def _flush(self, link: Link) -> None:
    """Waits until all that was sent is in the mirror; asks what was not."""
    link.send(["flush", 0])
    _, _, refused = link.receive()
    with self._changed:
      self._refused.update(refused)
