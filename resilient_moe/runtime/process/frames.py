"""The frames that AWs and EWs exchange on a link, and a link's two ends.

A frame is a fixed header and raw arrays behind it, in one `sendmsg` without a
copy. No end ever blocks in a read or a write, so two that send each other more
than the sockets hold can't wait for each other.
"""

import functools
import selectors
import socket
import struct
from typing import NamedTuple

import numpy as np

from resilient_moe.runtime.process.link import Link, aligned_empty
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
