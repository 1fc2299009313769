"""Bulk data between processes: pulls, and streams into a `KVMirror`.

A connection (`link.py`) pulls or streams. Streams get no replies but to a
flush.

  pull    -> ["pull", what, args]         <- ["arrays", header], bytes
                                          <- ["failed", reason]
  stream  -> ["hello", rank]
          -> ["put", segments, header], bytes
          -> ["log", step, layer, lanes, header], bytes
          -> ["commit", step, segments]
          -> ["rebase", request, header], bytes
          -> ["forget", names]
          -> ["flush", token]             <- ["flushed", token, refused]
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp
from typing import Any

import numpy as np

from resilient_moe.runtime.process.link import Address, Link, dial, left_s
from resilient_moe.runtime.process.mirror import Intake, KVMirror

Read = Callable[..., Sequence[np.ndarray]]

HANDSHAKE_S = 10.0  # for a peer that connects and then says nothing
CLOSE_S = 5.0
DRAIN_S = 0.01  # what a dead rank had sent is read by then; later is harmless
# What a peer that dies, stalls, has another key or talks another language
# leads to (a wrong greeting is an assertion in Python 3.11).
LOST = (OSError, EOFError, AuthenticationError, AssertionError, ValueError)
_PULLS = -1  # the rank of a connection that doesn't stream


class PullFailed(RuntimeError):
  """The peer is there, but could not read what was asked for."""


class DataServer:
  """Serves reads of this process, and takes streams into its mirror.

  Reads run in the connections' threads, several at a time.
  """

  def __init__(
    self, host: str, authkey: bytes, mirror: KVMirror | None,
    reads: Mapping[str, Read], delay_s: float = 0.0,
  ) -> None:  # fmt: skip
    """`reads` maps the name of a pull to what answers it.

    `delay_s` is a fault: how long each message of a stream lies unread.

    Always there: "streams_ended" (rank, timeout_s) and, with a mirror, "kv"
    (request_id) and "records".
    """
    self.complaints: list[str] = []  # of clients that were cut off
    self._authkey = authkey
    self._mirror = mirror
    self._delay_s = delay_s
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
    intake = Intake(self._mirror)
    while True:
      if self._delay_s:
        time.sleep(self._delay_s)
      match link.receive():
        case ["put", segments, header]:
          (data,) = link.receive_arrays(header)
          intake.put(segments, data)
        case ["log", step, layer, lanes, header]:
          (data,) = link.receive_arrays(header)
          intake.log(step, layer, lanes, data)
        case ["commit", step, segments]:
          intake.commit(step, segments)
        case ["rebase", name, header]:
          (kv,) = link.receive_arrays(header)
          intake.rebase(name, kv)
        case ["forget", names]:
          intake.forget(names)
        case ["flush", token]:
          link.send(["flushed", token, intake.take_refused()])
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
        link.limit(left_s(deadline_s))
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

  def streams_ended(
    self, rank: int, timeout_s: float, patience_s: float = HANDSHAKE_S
  ) -> bool:
    """`DataServer.streams_ended` at the peer, which may answer later still."""
    (ended,) = self.pull(
      "streams_ended", rank, timeout_s, timeout_s=timeout_s + patience_s
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
