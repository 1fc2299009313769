"""An AW's links to the EWs, and the frames that both ends exchange.

A link begins as in `link.py`: both ends prove that they know the key, then
["aw", rank, incarnation] is answered by ["welcome"] or ["refused", reason].
From there on it carries frames: a fixed header and raw arrays behind it, in one
`sendmsg` without a copy. No end ever blocks in a read or a write, so two that
send each other more than the sockets hold can't wait for each other.
"""

import contextlib
import functools
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from resilient_moe.datapath.parcels import Gone, Parcel, Result
from resilient_moe.runtime.process.data import HANDSHAKE_S, LOST
from resilient_moe.runtime.process.link import Address, Link, aligned_empty
from resilient_moe.runtime.process.mirror import named_dtype

PARCEL, RESULT, FAILURE = range(3)  # kinds of frames
MAX_BYTES = 1 << 28  # of a frame's arrays
NO_INDEX = np.zeros(0, np.int32)

_MAGIC = b"rmoe"
# magic, kind, dtype, urgent, ticket, layer, n, m, D
_HEADER = struct.Struct("<4sBBBxqiIII")
_DTYPES = ("uint8", "float32", "bfloat16", "float16", "float64")
_BUFFERS = 64  # in one sendmsg; the system takes 1024 at most
_ALIGNED_BYTES = 1 << 16  # below, a copy is faster than to find its place
_dtype = functools.cache(named_dtype)


class ComputeFailed(RuntimeError):
  """An EW is there, but its computation of a parcel raised."""

  def __init__(self, rank: int, ticket: int, reason: str) -> None:
    super().__init__(f"EW {rank}, ticket {ticket}: {reason}")
    self.rank, self.ticket, self.reason = rank, ticket, reason


class Frame(NamedTuple):
  """What travels on a link once it is greeted."""

  kind: int
  ticket: int
  layer: int
  urgent: bool
  data: np.ndarray  # [n, D] rows or y; [n, 1] uint8 text of a failure
  token: np.ndarray = NO_INDEX  # [m] int32
  slot: np.ndarray = NO_INDEX  # [m] int32

  def buffers(self) -> list[memoryview]:
    """Its bytes; the arrays must stay as they are until they are sent."""
    data, code = self.data, _code(self.data.dtype)
    if data.ndim != 2 or self.token.shape != self.slot.shape:
      raise ValueError(
        f"data {data.shape}, token {self.token.shape}, slot "
        f"{self.slot.shape}: needed are [n, D], [m] and [m]"
      )
    (n, width), (m,) = data.shape, self.token.shape
    _check_size(data.nbytes + 8 * m, n, m, width)
    head = _HEADER.pack(
      _MAGIC, self.kind, code, self.urgent, self.ticket, self.layer, n, m, width
    )
    parts = [memoryview(head), _raw(data)]
    if m:
      pad = memoryview(bytes(-data.nbytes % 4))
      index = (np.ascontiguousarray(a, np.int32) for a in self[5:])
      parts += [pad, *map(_raw, index)]
    return [part for part in parts if part]


class Pipe:
  """Frames on one greeted link, never blocking. Not thread-safe."""

  def __init__(
    self, link: Link, end: socket.socket, rank: int, incarnation: int
  ) -> None:
    """`end` is the socket of `link`; rank and incarnation are the peer's."""
    end.setblocking(False)
    self.rank, self.incarnation = rank, incarnation
    self.open = True
    self._link, self._end = link, end
    self._unsent: list[memoryview] = []
    self._head = bytearray(_HEADER.size)
    self._room = memoryview(self._head)  # what is still to be read
    self._body: np.ndarray | None = None  # None: the header is being read
    self._watched = 0

  def put(self, frame: list[memoryview]) -> None:
    """Queues a frame's buffers behind those that have not left yet."""
    self._unsent += frame

  def flush(self) -> None:
    """Sends what the socket takes now; OSError if it has ended."""
    while self._unsent:
      try:
        sent = self._end.sendmsg(self._unsent[:_BUFFERS])
      except BlockingIOError:
        return
      while sent and sent >= len(self._unsent[0]):
        sent -= len(self._unsent.pop(0))
      if sent:
        self._unsent[0] = self._unsent[0][sent:]

  def read(self) -> Frame | None:
    """The next frame, if all of it is here.

    Raises:
      OSError, EOFError: the link has ended.
      ValueError: what comes is no frame.
    """
    while True:
      while self._room:
        try:
          count = self._end.recv_into(self._room)
        except BlockingIOError:
          return None
        if not count:
          raise EOFError("the peer has closed the link")
        self._room = self._room[count:]
      if self._body is not None:
        frame = _frame(self._head, self._body)
        self._body, self._room = None, memoryview(self._head)
        return frame
      self._body = _room(_body_bytes(self._head))
      self._room = self._body.data

  def watch(self, selector: selectors.BaseSelector, silent: bool) -> None:
    """Lets the selector tell when there is something to do; not if silent."""
    write = selectors.EVENT_WRITE if self._unsent else 0
    wanted = 0 if silent else selectors.EVENT_READ | write
    if wanted != self._watched:
      if not self._watched:
        selector.register(self._end, wanted, self)
      elif wanted:
        selector.modify(self._end, wanted, self)
      else:
        selector.unregister(self._end)
      self._watched = wanted

  def close(self, selector: selectors.BaseSelector) -> None:
    if self.open:
      self.open = False
      self._unsent.clear()
      self.watch(selector, silent=True)
      self._link.shutdown()
      self._link.close()


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
      self._ready.append(Gone(rank))
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


def _body_bytes(head: bytearray) -> int:
  """Of the arrays behind a header."""
  magic, kind, code, _, _, _, n, m, width = _HEADER.unpack(head)
  if magic != _MAGIC or kind > FAILURE or code >= len(_DTYPES):
    raise ValueError(f"no frame begins with {bytes(head[:8])!r}")
  data = n * width * _dtype(_DTYPES[code]).itemsize
  index = -data % 4 + 8 * m if m else 0
  _check_size(data + index, n, m, width)
  return data + index


def _frame(head: bytearray, body: np.ndarray) -> Frame:
  _, kind, code, urgent, ticket, layer, n, m, width = _HEADER.unpack(head)
  cut = len(body) - 8 * m
  dtype = _dtype(_DTYPES[code])
  data = body[: n * width * dtype.itemsize].view(dtype).reshape(n, width)
  token, slot = body[cut:].view(np.int32).reshape(2, m)
  if m and token.view(np.uint32).max() >= n:
    raise ValueError(f"an assignment of a frame names none of its {n} rows")
  return Frame(kind, ticket, layer, bool(urgent), data, token, slot)


@functools.cache
def _code(dtype: np.dtype) -> int:
  if dtype.name not in _DTYPES:
    raise ValueError(
      f"a frame can't carry {dtype.name}; choose one of {', '.join(_DTYPES)}"
    )
  return _DTYPES.index(dtype.name)


def _room(nbytes: int) -> np.ndarray:
  if nbytes < _ALIGNED_BYTES:
    return np.empty(nbytes, np.uint8)
  return aligned_empty((nbytes,), np.dtype(np.uint8))


def _check_size(nbytes: int, n: int, m: int, width: int) -> None:
  if nbytes > MAX_BYTES:
    raise ValueError(
      f"a frame of {nbytes} bytes (n={n}, m={m}, D={width}) is beyond the "
      f"limit of {MAX_BYTES}"
    )


def _raw(array: np.ndarray) -> memoryview:
  return array.reshape(-1).view(np.uint8).data
