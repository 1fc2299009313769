"""Where workers come in: connections, their key checked, by who they are."""

import contextlib
import socket
import threading
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp

from resilient_moe.runtime.process.wire import Address, Hello, prompt

# What a stranger, or a worker that dies at the door, leads to.
_STRANGE = (OSError, EOFError, AuthenticationError, AssertionError, ValueError)


class Door:
  """Listens; every connection is greeted in a thread of its own.

  So whoever stands silent at the door keeps nobody else out.
  """

  def __init__(self, address: Address, authkey: bytes) -> None:
    self._authkey = authkey
    self._socket = socket.create_server(address, backlog=64)
    self._arrived: list[tuple[Hello, mp.Connection]] = []
    threading.Thread(target=self._accept, daemon=True).start()

  @property
  def address(self) -> Address:
    host, port = self._socket.getsockname()[:2]
    return str(host), int(port)

  def arrivals(self) -> list[tuple[Hello, mp.Connection]]:
    """Who has come in since the last time this was asked."""
    here, self._arrived = self._arrived, []
    return here

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)  # wakes the acceptor
    self._socket.close()

  def _accept(self) -> None:
    while True:
      try:
        end, _ = self._socket.accept()
      except OSError:
        return  # closed
      threading.Thread(target=self._greet, args=(end,), daemon=True).start()

  def _greet(self, end: socket.socket) -> None:
    connection = prompt(mp.Connection(end.detach()))
    try:
      mp.deliver_challenge(connection, self._authkey)
      mp.answer_challenge(connection, self._authkey)
      hello = connection.recv()
    except _STRANGE:
      connection.close()
      return
    if isinstance(hello, Hello):
      self._arrived.append((hello, connection))
