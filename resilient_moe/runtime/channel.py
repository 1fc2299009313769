"""JSON lines between the gateway and an engine, over a socket pair."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any

from resilient_moe.report import Recorder
from resilient_moe.serving.request import Request

Message = dict[str, Any]


class Channel:
  """One end of the pair."""

  def __init__(self, end: socket.socket) -> None:
    self._socket = end
    self._buffer = b""
    self.closed = False

  def send(self, message: Message) -> None:
    self.send_line(json.dumps(message))

  def send_line(self, line: str) -> None:
    self._socket.setblocking(True)
    self._socket.sendall(line.encode() + b"\n")

  def close(self) -> None:
    self._socket.close()

  def receive(self, wait_s: float | None = 0.0) -> list[Message]:
    """Messages that have come; waits up to `wait_s` (None: for ever)."""
    self._socket.settimeout(wait_s)
    try:
      data = self._socket.recv(1 << 20)
    except (BlockingIOError, TimeoutError):
      return []
    except ConnectionResetError:
      data = b""
    if not data:
      self.closed = True
      return []
    *lines, self._buffer = (self._buffer + data).split(b"\n")
    return [json.loads(line) for line in lines]

  def first(self) -> tuple[Message, list[Message]]:
    """Waits for a message; it, and those that came right behind it.

    Raises:
      ConnectionError: the other end is gone.
    """
    while not self.closed:
      if messages := self.receive(None):
        return messages[0], messages[1:]
    raise ConnectionError("the other end of the channel is gone")


class ChannelRecorder(Recorder):
  """An engine's events, sent to the gateway as they happen.

  All processes of a run count their seconds from the gateway's start, on the
  machine's monotonic clock.
  """

  def __init__(self, send_line: Callable[[str], None], start_s: float) -> None:
    super().__init__(time.monotonic)
    self.start_s = start_s
    self._send_line = send_line

  def _record(self, line: str) -> None:
    self._send_line(line)


def request_to_json(request: Request) -> Message:
  """A request as plain data."""
  return dict(vars(request))


def request_from_json(fields: Message) -> Request:
  """The inverse of `request_to_json`."""
  lists = {k: tuple(fields[k]) for k in ("prompt", "stop")}
  return Request(**{**fields, **lists})
