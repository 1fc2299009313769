"""One end of a connection between processes: messages, and arrays behind.

`multiprocessing.connection` proves that both ends know the key and frames the
messages, which are JSON: nothing that comes from a peer is unpickled. Arrays
follow their message as raw bytes on the same socket, received where they stay:
`recv_bytes_into` would gather them in between, 3.6 times slower at 4 MiB.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from multiprocessing import connection as mp
from typing import Any

import numpy as np

from resilient_moe.runtime.process.mirror import named_dtype

Address = tuple[str, int]

AUTHKEY = "RMOE_AUTHKEY"  # environment variable, in hex
ALIGN_BYTES = 64  # JAX on CPU takes a host array as it is only if aligned


class Link:
  """One end of a connection: messages, and arrays behind them."""

  def __init__(self, end: socket.socket) -> None:
    # Without it, a step would wait for the acknowledgement of its header.
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setblocking(True)
    self._socket = end
    self._messages = mp.Connection(os.dup(end.fileno()))

  def greet(self, authkey: bytes, asks_first: bool) -> None:
    """Both ends prove that they know the key; the server asks first."""
    asks = mp.deliver_challenge, mp.answer_challenge
    for step in asks if asks_first else asks[::-1]:
      step(self._messages, authkey)

  def limit(self, wait_s: float) -> None:
    """No read or write waits longer than this (0: for ever)."""
    whole = max(wait_s, 0.001) if wait_s else 0.0
    limit = struct.pack("ll", int(whole), int(whole % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
      self._socket.setsockopt(socket.SOL_SOCKET, option, limit)

  def send(self, message: list, arrays: Sequence[np.ndarray] = ()) -> None:
    """Sends a message; with arrays, their header becomes its last entry."""
    if arrays:
      message = [*message, [(a.shape, _dtype_name(a.dtype)) for a in arrays]]
    self._messages.send_bytes(json.dumps(message).encode())
    for array in arrays:
      self._socket.sendall(_raw(np.ascontiguousarray(array)))

  def receive(self) -> list[Any]:
    return list(json.loads(self._messages.recv_bytes()))

  def receive_arrays(
    self, header: list, deadline_s: float | None = None
  ) -> list[np.ndarray]:
    """The arrays behind a message; `deadline_s` on the monotonic clock."""
    arrays = [aligned_empty(s, named_dtype(dtype)) for s, dtype in header]
    for array in arrays:
      room = _raw(array)
      while room:
        if deadline_s is not None:
          self.limit(left_s(deadline_s))
        count = self._socket.recv_into(room, 0, socket.MSG_WAITALL)
        if not count:
          raise EOFError("the connection ended inside an array")
        room = room[count:]
    return arrays

  def shutdown(self) -> None:
    """Wakes whoever reads or writes here, in any thread."""
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)

  def close(self) -> None:
    self._messages.close()
    self._socket.close()


def dial(address: Address, timeout_s: float) -> Link:
  """Connects; the two must still greet each other."""
  link = Link(socket.create_connection(address, timeout_s))
  link.limit(timeout_s)
  return link


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array to be filled, at a multiple of 64 bytes."""
  if any(size < 0 for size in shape):  # it may come from a peer
    raise ValueError(f"shape {shape} of an array has a negative size")
  nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  raw = np.empty(nbytes + ALIGN_BYTES, np.uint8)
  start = -raw.ctypes.data % ALIGN_BYTES
  return raw[start : start + nbytes].view(dtype).reshape(shape)


def _raw(array: np.ndarray) -> memoryview:
  """The bytes of a contiguous array of any dtype and rank."""
  return array.reshape(-1).view(np.uint8).data


def _dtype_name(dtype: np.dtype) -> str:
  """What `named_dtype` reads; numpy's own code says too little of bfloat16."""
  return dtype.name if dtype.kind == "V" else dtype.str


def left_s(deadline_s: float) -> float:
  """Seconds until a moment; TimeoutError if it has passed."""
  left = deadline_s - time.monotonic()
  if left <= 0:
    raise TimeoutError
  return left
