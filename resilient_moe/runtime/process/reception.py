"""Where AWs come in to an EW: their links are accepted and greeted.

Each in a thread of its own, because a stranger may be silent and the desk's
computation long.
"""

import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import connection as mp

from resilient_moe.runtime.process.data import HANDSHAKE_S
from resilient_moe.runtime.process.link import Address, Link

# (link, its socket, rank, incarnation) of an AW that knows the key
Admit = Callable[[Link, socket.socket, int, int], None]

_FULL_S = 0.01  # before trying again, on a machine that is out of sockets


class Reception:
  """Listens until it is closed."""

  def __init__(
    self, host: str, authkey: bytes, admit: Admit,
    complain: Callable[[str], None],
  ) -> None:  # fmt: skip
    """`admit` lets a greeted link in; what it raises ends the link."""
    self._authkey, self._admit, self._complain = authkey, admit, complain
    self._lock = threading.Lock()
    self._greeting: dict[Link, threading.Thread] = {}
    self._listener = socket.create_server((host, 0), backlog=128)
    self._listener.setblocking(False)
    self.address: Address = self._listener.getsockname()[:2]
    self._ending, self._ender = socket.socketpair()
    self._thread = threading.Thread(target=self._accept, daemon=True)
    self._thread.start()

  def close(self) -> None:
    """No link is let in from here on; ends every thread."""
    self._ender.close()
    self._thread.join()
    with self._lock:
      greeting = dict(self._greeting)
    for link in greeting:
      link.shutdown()
    for thread in greeting.values():
      thread.join()

  def _accept(self) -> None:
    while self._ending not in mp.wait([self._listener, self._ending]):
      try:
        end = self._listener.accept()[0]
        link = Link(end)
        thread = threading.Thread(
          target=self._greet, args=(link, end), daemon=True
        )
        with self._lock:  # it leaves `_greeting` under it, too
          thread.start()
          self._greeting[link] = thread
      except (OSError, RuntimeError):  # it is gone, or the machine is full
        time.sleep(_FULL_S)
    self._listener.close()
    self._ending.close()

  def _greet(self, link: Link, end: socket.socket) -> None:
    try:
      link.limit(HANDSHAKE_S)
      link.greet(self._authkey, asks_first=True)
      first = link.receive()
      if len(first) != 3 or first[0] != "aw":
        raise ValueError(f"a link can't begin with {first!r:.80}")
      self._admit(link, end, int(first[1]), int(first[2]))
    except Exception as error:  # noqa: BLE001 - whatever a client talks
      self._complain(repr(error))
      link.close()
    finally:
      with self._lock:
        self._greeting.pop(link, None)
