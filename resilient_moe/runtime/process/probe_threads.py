"""Probes without a compiler: what `probe.c` does, in Python threads.

A held interpreter lock looks like silence here, hence `probe.py` prefers the
library.
"""

import contextlib
import dataclasses
import select
import socket
import struct
import threading
import time

_PROBE = struct.Struct("=B3xIQ")  # kind, slot, number, as in probe.c
_ASKED, _ANSWERED = 1, 2


@dataclasses.dataclass
class _Target:
  """`struct slot` of probe.c."""

  address: tuple[str, int]
  heard_s: float
  waiting: bool = False
  missed: int = 0


class Threaded:
  """The prober of `probe.c` in Python; the comments are there.

  A slot is never used twice, so it needs no number of its first probe.
  """

  def __init__(self, interval_s: float) -> None:
    self._interval_s = interval_s
    self._next_s = time.monotonic()
    self._targets: dict[int, _Target] = {}
    self._added = 0
    self._stopped = False
    self._lock = threading.Lock()
    self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    self._socket.setblocking(False)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def add(self, host: str, port: int) -> int:
    with self._lock:
      self._added += 1
      self._targets[self._added] = _Target((host, port), time.monotonic())
      return self._added

  def remove(self, slot: int) -> None:
    with self._lock:
      del self._targets[slot]

  def silence_s(self, slot: int) -> float:
    with self._lock:
      end_s = min(time.monotonic(), self._next_s + self._interval_s)
      return max(0.0, end_s - self._targets[slot].heard_s)

  def missed(self, slot: int) -> int:
    with self._lock:
      return self._targets[slot].missed

  def stop(self) -> None:
    self._stopped = True
    self._thread.join()
    self._socket.close()

  def _watch(self) -> None:
    readable = select.poll()
    readable.register(self._socket, select.POLLIN)
    while not self._stopped:
      with self._lock:
        self._hear()
        now = time.monotonic()
        if now >= self._next_s:
          self._ask(now)
        wait_ms = 1e3 * (self._next_s - time.monotonic())
      readable.poll(max(0.0, min(wait_ms, 50.0)))

  def _hear(self) -> None:
    with contextlib.suppress(BlockingIOError):
      while True:
        data = self._socket.recv(64)
        if len(data) != _PROBE.size:
          continue
        kind, slot, _ = _PROBE.unpack(data)
        if kind == _ANSWERED and (target := self._targets.get(slot)):
          target.heard_s, target.waiting = time.monotonic(), False
          target.missed = 0

  def _ask(self, now: float) -> None:
    lost_s = max(0.0, now - (self._next_s + self._interval_s))
    for slot, target in self._targets.items():
      target.heard_s = min(now, target.heard_s + lost_s)
      target.missed += target.waiting
      target.waiting = True
      with contextlib.suppress(OSError):
        self._socket.sendto(_PROBE.pack(_ASKED, slot, 0), target.address)
    self._next_s = time.monotonic() + self._interval_s


def respond(end: socket.socket) -> None:
  """Answers for ever, as `respond` of probe.c."""
  while True:
    data, sender = end.recvfrom(64)
    if len(data) == _PROBE.size and data[0] == _ASKED:
      with contextlib.suppress(OSError):
        end.sendto(bytes([_ANSWERED]) + data[1:], sender)
