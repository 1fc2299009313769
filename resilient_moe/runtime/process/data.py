"""Bulk data between processes: pulls, and streams into a `KVMirror`.

`multiprocessing.connection` proves that both ends know the key and frames the
messages, which are JSON: nothing that comes from a peer is unpickled. Arrays
follow their message as raw bytes on the same socket, received where they stay:
`recv_bytes_into` would gather them in between, 3.6 times slower at 4 MiB.

A connection pulls or streams. Streams get no replies but to a flush.

  pull    -> ["pull", what, args]         <- ["arrays", header], bytes
                                          <- ["failed", reason]
  stream  -> ["hello", rank]
          -> ["put", segments, header], bytes
          -> ["rebase", request, header], bytes
          -> ["forget", names]
          -> ["flush", token]             <- ["flushed", token, refused]
"""

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp
from typing import Any

import numpy as np

from resilient_moe.runtime.process.mirror import KVMirror, named_dtype

Address = tuple[str, int]
Read = Callable[..., Sequence[np.ndarray]]

ALIGN_BYTES = 64  # JAX on CPU takes a host array as it is only if aligned
HANDSHAKE_S = 10.0  # for a peer that connects and then says nothing
CLOSE_S = 5.0
# What a peer that dies, stalls, has another key or talks another language
# leads to (a wrong greeting is an assertion in Python 3.11).
LOST = (OSError, EOFError, AuthenticationError, AssertionError, ValueError)
_PULLS = -1  # the rank of a connection that doesn't stream


class PullFailed(RuntimeError):
  """The peer is there, but could not read what was asked for."""


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
          self.limit(_left_s(deadline_s))
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


def _left_s(deadline_s: float) -> float:
  left = deadline_s - time.monotonic()
  if left <= 0:
    raise TimeoutError
  return left


class DataServer:
  """Serves reads of this process, and takes streams into its mirror.

  Reads run in the connections' threads, several at a time.
  """

  def __init__(
    self, host: str, authkey: bytes, mirror: KVMirror | None,
    reads: Mapping[str, Read],
  ) -> None:  # fmt: skip
    """`reads` maps the name of a pull to what answers it.

    Always there: "streams_ended" (rank, timeout_s) and, with a mirror, "kv"
    (request_id) and "records".
    """
    self.complaints: list[str] = []  # of clients that were cut off
    self._authkey = authkey
    self._mirror = mirror
    ended = lambda rank, wait_s: [np.array(self.streams_ended(rank, wait_s))]
    own: dict[str, Read] = {"streams_ended": ended}
    if mirror is not None:
      own |= {"kv": self._kv, "records": self._records}
    self._reads: dict[str, Read] = {**own, **reads}
    self._listener = socket.create_server((host, 0), backlog=128)
    self._listener.setblocking(False)
    self.address: Address = self._listener.getsockname()[:2]
    self._wake, self._waker = socket.socketpair()
    self._changed = threading.Condition()
    # Its rank; None: it hasn't said what it is.
    self._open: dict[Link, int | None] = {}
    self._threads: dict[Link, threading.Thread] = {}
    self._closed = False
    self._acceptor = threading.Thread(target=self._accept, daemon=True)
    self._acceptor.start()

  def streams_ended(self, rank: int, timeout_s: float) -> bool:
    """Waits until all that a dead rank had sent is in the mirror.

    That is, until every stream it ever opened was read to its end. One that
    has not been accepted yet or has not said its rank may be its.
    """
    with self._changed:
      return self._changed.wait_for(lambda: self._ended(rank), timeout_s)

  def close(self) -> None:
    """Ends every connection and thread."""
    with self._changed:
      if self._closed:
        return
      self._closed = True
      self._changed.notify_all()
    self._waker.close()
    self._acceptor.join()
    self._listener.close()
    self._wake.close()
    with self._changed:
      threads = dict(self._threads)
    for link in threads:
      link.shutdown()
    for thread in threads.values():
      thread.join(CLOSE_S)

  def _ended(self, rank: int) -> bool:
    if self._closed:
      return True
    # Connections leave the queue of the listener under the same lock.
    waiting = bool(mp.wait([self._listener], 0))
    return not waiting and not {rank, None} & set(self._open.values())

  def _accept(self) -> None:
    while self._wake not in mp.wait([self._listener, self._wake]):
      try:
        with self._changed:
          link = Link(self._listener.accept()[0])
          thread = threading.Thread(
            target=self._serve, args=(link,), daemon=True
          )
          thread.start()
          self._open[link], self._threads[link] = None, thread
      except (OSError, RuntimeError):  # it is gone, or the machine is full
        time.sleep(0.01)

  def _serve(self, link: Link) -> None:
    """One connection, to its end; a broken client ends nothing else."""
    try:
      link.limit(HANDSHAKE_S)
      link.greet(self._authkey, asks_first=True)
      first = link.receive()
      rank = int(first[1]) if first[0] == "hello" else _PULLS
      with self._changed:
        self._open[link] = rank
        self._changed.notify_all()
      link.limit(0)
      if rank != _PULLS:
        self._take_stream(link)
      while True:
        self._answer(link, *first)
        first = link.receive()
    except (OSError, EOFError, AuthenticationError) as error:
      if isinstance(error, AuthenticationError):
        self.complaints.append(f"wrong key: {error}")
    except Exception as error:  # noqa: BLE001 - whatever a client talks
      self.complaints.append(repr(error))
    finally:
      link.close()
      with self._changed:
        del self._open[link], self._threads[link]
        self._changed.notify_all()

  def _take_stream(self, link: Link) -> None:
    """Reads a stream to its end; a message counts when all of it is here."""
    if self._mirror is None:
      raise ValueError("a stream to a process that keeps no mirror")
    refused: dict[str, None] = {}  # a set that keeps their order
    while True:
      match link.receive():
        case ["put", segments, header]:
          (data,) = link.receive_arrays(header)
          for name, _, start, _ in segments:
            if start == 0:
              refused.pop(name, None)
          refused |= dict.fromkeys(self._mirror.put(segments, data))
        case ["rebase", name, header]:
          (kv,) = link.receive_arrays(header)
          self._mirror.rebase(name, kv)
          refused.pop(name, None)
        case ["forget", names]:
          self._mirror.forget(names)
          for name in names:
            refused.pop(name, None)
        case ["flush", token]:
          link.send(["flushed", token, list(refused)])
          refused.clear()
        case message:
          raise ValueError(f"a stream can't contain {message!r:.80}")

  def _answer(self, link: Link, kind: str, what: str, args: list) -> None:
    if kind != "pull":
      raise ValueError(f"a connection can't begin with {kind!r:.80}")
    try:
      if what not in self._reads:
        raise LookupError(f"unknown; choose one of {', '.join(self._reads)}")
      arrays = [np.asarray(a) for a in self._reads[what](*args)]
    except Exception as error:  # noqa: BLE001 - it is the client's to handle
      link.send(["failed", f"{type(error).__name__}: {error}"])
      return
    link.send(["arrays"] if arrays else ["arrays", []], arrays)

  def _kv(self, request_id: str) -> list[np.ndarray]:
    assert self._mirror is not None
    kv = self._mirror.get(request_id)
    if kv is None:
      raise LookupError(f"nothing of request {request_id!r} is kept here")
    return [kv]

  def _records(self) -> list[np.ndarray]:
    assert self._mirror is not None
    text = json.dumps(self._mirror.records()).encode()
    return [np.frombuffer(text, np.uint8)]


class DataClient:
  """Pulls from one `DataServer`; connects when it is first asked to."""

  def __init__(self, address: Address, authkey: bytes) -> None:
    self.address = address
    self._authkey = authkey
    self._link: Link | None = None
    self._lock = threading.Lock()

  def pull(
    self, what: str, *args: Any, timeout_s: float = 10.0
  ) -> list[np.ndarray]:
    """What the peer's read of that name returns for plain `args`.

    The arrays are aligned so that JAX on CPU takes them as they are.

    Raises:
      ConnectionError: the peer is dead, silent for `timeout_s`, or has
        another key. The next pull connects again.
      PullFailed: it could not read this; the connection is as before.
    """
    deadline_s = time.monotonic() + timeout_s
    with self._lock:
      try:
        link = self._connected(timeout_s)
        link.limit(_left_s(deadline_s))
        link.send(["pull", what, args])
        kind, content = link.receive()
        if kind == "arrays":
          return link.receive_arrays(content, deadline_s)
      except LOST as error:
        self._drop()
        slow = isinstance(error, BlockingIOError | TimeoutError)
        reason = f"no answer in {timeout_s} s" if slow else repr(error)
        host, port = self.address
        raise ConnectionError(
          f"pull of {what!r} from {host}:{port}: {reason}"
        ) from error
    raise PullFailed(f"{what!r} of {self.address}: {content}")

  def records(self, timeout_s: float = 10.0) -> dict[str, int]:
    """What the peer's mirror keeps: request -> positions committed."""
    (text,) = self.pull("records", timeout_s=timeout_s)
    return dict(json.loads(text.tobytes()))

  def streams_ended(self, rank: int, timeout_s: float) -> bool:
    """`DataServer.streams_ended` at the peer."""
    (ended,) = self.pull(
      "streams_ended", rank, timeout_s, timeout_s=timeout_s + HANDSHAKE_S
    )
    return bool(ended)

  def close(self) -> None:
    """Ends the connection, and with it a pull in another thread."""
    if (link := self._link) is not None:
      link.shutdown()
    with self._lock:
      self._drop()

  def _connected(self, timeout_s: float) -> Link:
    if self._link is None:
      self._link = dial(self.address, timeout_s)
      self._link.greet(self._authkey, asks_first=False)
    return self._link

  def _drop(self) -> None:
    if self._link is not None:
      self._link.close()
      self._link = None
