"""An AW's links to the EWs.

A link begins as in `link.py`: both ends prove that they know the key, then
["aw", rank, incarnation] is answered by ["welcome"] or ["refused", reason].
From there on it carries frames (`frames.py`).
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable

from resilient_moe.datapath.parcels import Gone, Parcel, Result
from resilient_moe.runtime.process.data import HANDSHAKE_S, LOST
from resilient_moe.runtime.process.frames import (
  FAILURE,
  PARCEL,
  RESULT,
  Frame,
  Pipe,
)
from resilient_moe.runtime.process.link import Address, Link


class ComputeFailed(RuntimeError):
  """An EW is there, but its computation of a parcel raised."""

  def __init__(self, rank: int, ticket: int, reason: str) -> None:
    super().__init__(f"EW {rank}, ticket {ticket}: {reason}")
    self.rank, self.ticket, self.reason = rank, ticket, reason


class Peers:
  """One AW's links to the EWs: `datapath.parcels.Transport` over sockets.

  One thread sends and receives; what is queued leaves while it receives.
  Any thread may connect, disconnect and wake it.
  """

  def __init__(
    self, rank: int, incarnation: int, authkey: bytes,
    answers: Callable[[int], bool],
  ) -> None:  # fmt: skip
    """`answers` says whether an EW answers probes."""
    self.complaints: list[str] = []  # of EWs that sent what is no frame
    self._greeting = ["aw", rank, incarnation]
    self._authkey = authkey
    self._answers = answers
    self._lock = threading.Lock()  # of all below
    self._pipes: dict[int, Pipe] = {}
    self._ready: list[Result | Gone] = []
    self._failures: list[ComputeFailed] = []
    self._woken = False
    self._wake, self._waker = socket.socketpair()
    self._waker.setblocking(False)
    self._selector = selectors.DefaultSelector()
    self._selector.register(self._wake, selectors.EVENT_READ)

  def connect(self, rank: int, address: Address, incarnation: int) -> None:
    """Opens the link to an EW; one to an older incarnation is then `Gone`.

    Nothing happens if there is a link to this or a newer one.

    Raises:
      ConnectionError: it is not there, has another key, or has fenced us.
    """
    if self._newer(rank, incarnation):
      return
    pipe = self._dialed(rank, address, incarnation)
    with self._lock:
      if self._newer(rank, incarnation):  # another thread was faster
        pipe.close(self._selector)
        return
      self._drop(rank)
      self._pipes[rank] = pipe
      pipe.watch(self._selector, silent=False)

  def disconnect(self, rank: int) -> None:
    """Ends a link, which `receive` then tells; nothing if there is none."""
    with self._lock:
      self._drop(rank)

  def wake(self) -> None:
    """Ends a wait in `receive`, or the next one, at once."""
    with self._lock:
      self._woken = True
      self._rouse()

  def send(self, rank: int, ticket: int, parcel: Parcel) -> None:
    """Its arrays must stay as they are until the answer is here."""
    self._send(rank, Frame(PARCEL, ticket, parcel[0], False, *parcel[1:]))

  def send_urgent(self, rank: int, ticket: int, parcel: Parcel) -> None:
    self._send(rank, Frame(PARCEL, ticket, parcel[0], True, *parcel[1:]))

  def receive(self, wait_s: float) -> list[Result | Gone]:
    """What has come, waiting for the first at most `wait_s`.

    Raises:
      ComputeFailed: an EW could not compute a parcel; what else has come is
        kept for the next call.
    """
    deadline_s = time.monotonic() + wait_s
    last = False
    while True:
      with self._lock:
        if self._failures:
          raise self._failures.pop(0)
        if self._ready or self._woken or last:
          come, self._ready, self._woken = self._ready, [], False
          return come
      left_s = deadline_s - time.monotonic()
      last = left_s <= 0
      events = self._selector.select(max(left_s, 0))
      with self._lock:
        for key, mask in events:
          self._attend(key.data, mask)

  def answers(self, rank: int) -> bool:
    return self._answers(rank)

  def close(self) -> None:
    """Ends every link; for the thread that receives."""
    with self._lock:
      for rank in list(self._pipes):
        self._drop(rank)
      self._selector.close()
      self._wake.close()
      self._waker.close()

  def _dialed(self, rank: int, address: Address, incarnation: int) -> Pipe:
    try:
      end = socket.create_connection(address, HANDSHAKE_S)
      link = Link(end)
      try:
        link.limit(HANDSHAKE_S)
        link.greet(self._authkey, asks_first=False)
        link.send(self._greeting)
        reply = link.receive()
        if reply != ["welcome"]:
          raise ConnectionRefusedError(" ".join(map(str, reply)))
      except BaseException:
        link.close()
        raise
    except LOST as error:
      slow = isinstance(error, BlockingIOError | TimeoutError)
      reason = f"no answer in {HANDSHAKE_S} s" if slow else repr(error)
      raise ConnectionError(
        f"no link to EW {rank} at {address[0]}:{address[1]}: {reason}"
      ) from error
    return Pipe(link, end, rank, incarnation)

  def _newer(self, rank: int, incarnation: int) -> bool:
    pipe = self._pipes.get(rank)
    return pipe is not None and pipe.incarnation >= incarnation

  def _drop(self, rank: int) -> None:
    if pipe := self._pipes.pop(rank, None):
      pipe.close(self._selector)
      self._ready.append(Gone(rank, pipe.incarnation))
      self._rouse()

  def _rouse(self) -> None:
    with contextlib.suppress(OSError):  # full, so it wakes; or closed
      self._waker.send(b"x")

  def _send(self, rank: int, frame: Frame) -> None:
    buffers = frame.buffers()
    with self._lock:
      if pipe := self._pipes.get(rank):
        pipe.put(buffers)
        self._attend(pipe, selectors.EVENT_WRITE)
      else:
        self._ready.append(Gone(rank))

  def _attend(self, pipe: Pipe | None, mask: int) -> None:
    if pipe is None:
      self._wake.recv(4096)
    elif pipe.open:  # it may have ended since the selector told of it
      try:
        if mask & selectors.EVENT_WRITE:
          pipe.flush()
        if mask & selectors.EVENT_READ and (frame := pipe.read()):
          self._take(pipe, frame)
        pipe.watch(self._selector, silent=False)
      except (OSError, EOFError, ValueError) as error:
        if isinstance(error, ValueError):
          self.complaints.append(f"EW {pipe.rank}: {error}")
        self._drop(pipe.rank)

  def _take(self, pipe: Pipe, frame: Frame) -> None:
    if frame.kind == RESULT:
      self._ready.append(Result(pipe.rank, frame.ticket, frame.data))
    elif frame.kind == FAILURE:
      reason = frame.data.tobytes().decode(errors="replace")
      self._failures.append(ComputeFailed(pipe.rank, frame.ticket, reason))
    else:
      raise ValueError(f"an EW can't send a frame of kind {frame.kind}")
