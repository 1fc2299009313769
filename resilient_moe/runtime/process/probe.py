"""Probes between processes: who answers, how long ago, how many were missed.

Both ends are threads of compiled code (`probe.c`), which answer, send and time
while the interpreter is busy. Where there is no compiler, Python threads do
the same less well: a held interpreter lock then looks like silence, so the
caller should warn when `native` is False.
"""

import ctypes
import dataclasses
import errno
import hashlib
import ipaddress
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import threading
from typing import Any, Self

from resilient_moe.compiled import compiled_once
from resilient_moe.runtime.process.probe_threads import Threaded, respond

Library = ctypes.CDLL  # its calls release the interpreter lock

_SOURCE = pathlib.Path(__file__).with_name("probe.c")
_COMPILE_S = 60.0
_MIN_INTERVAL_S = 0.001  # the resolution of poll()
_HANDLE = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
  "probe_responder_start": (
    ctypes.c_int,
    [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int)],
  ),
  "prober_start": (_HANDLE, [ctypes.c_double]),
  "prober_add": (ctypes.c_int, [_HANDLE, ctypes.c_char_p, ctypes.c_int]),
  "prober_remove": (None, [_HANDLE, ctypes.c_int]),
  "prober_silence": (ctypes.c_double, [_HANDLE, ctypes.c_int]),
  "prober_missed": (ctypes.c_long, [_HANDLE, ctypes.c_int]),
  "prober_stop": (None, [_HANDLE]),
}


def library(folder: pathlib.Path) -> Library | None:
  """The compiled `probe.c`, from `folder` if it is there already.

  Compiled with `$CC`, or `cc`. None if that fails, or if its result can't be
  loaded.
  """
  digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
  # The machine too, for a folder that several kinds of hosts share.
  path = folder / f"probe-{platform.machine()}-{digest}.so"
  if not _compile(path):
    return None
  try:
    lib = ctypes.CDLL(str(path), use_errno=True)
  except OSError:
    return None
  for name, (result, arguments) in _SIGNATURES.items():
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments
  return lib


@dataclasses.dataclass(frozen=True)
class Responder:
  """Answers probes on this UDP port until the process ends.

  Attributes:
    port: where it answers.
    native: False if Python answers, so that a busy interpreter is silent.
  """

  port: int
  native: bool

  @classmethod
  def start(cls, host: str, folder: pathlib.Path) -> Self:
    """Starts one on a numeric IPv4 address; compiled code is in `folder`."""
    _check_host(host)
    if lib := library(folder):
      port = ctypes.c_int()
      code = lib.probe_responder_start(host.encode(), ctypes.byref(port))
      _check_code(code, f"a responder on {host}")
      return cls(port.value, native=True)
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
      end.bind((host, 0))
    except OSError as error:
      end.close()
      _check_code(-(error.errno or errno.EIO), f"a responder on {host}")
    threading.Thread(target=respond, args=(end,), daemon=True).start()
    return cls(end.getsockname()[1], native=False)


class Prober:
  """Asks every target once an interval, and remembers who answered when.

  Targets are known by a number that the caller gives. Any thread may call.
  """

  def __init__(self, interval_s: float, folder: pathlib.Path) -> None:
    if not _MIN_INTERVAL_S <= interval_s < float("inf"):
      raise ValueError(
        f"interval_s is {interval_s}; needed is a finite number of at least "
        f"{_MIN_INTERVAL_S}"
      )
    lib = library(folder)
    self.native = lib is not None
    self._lock = threading.Lock()
    self._slots: dict[int, int] = {}
    self._probes: _Native | Threaded | None = (
      _Native(lib, interval_s) if lib else Threaded(interval_s)
    )

  def add(self, name: int, host: str, port: int) -> None:
    """Watches a responder; its silence counts from now."""
    _check_host(host)
    if not 1 <= port <= 65535:
      raise ValueError(f"port is {port}; needed is 1 to 65535")
    with self._lock:
      if name in self._slots:
        raise ValueError(f"target {name} is watched already; remove it first")
      self._slots[name] = self._running().add(host, port)

  def remove(self, name: int) -> None:
    with self._lock:
      self._running().remove(self._slot(name))
      del self._slots[name]

  def silence_s(self, name: int) -> float:
    """Seconds since the last answer, or since it was added.

    Time in which the prober itself could not run is left out.
    """
    with self._lock:
      return self._running().silence_s(self._slot(name))

  def missed(self, name: int) -> int:
    """Probes in a row that were unanswered when the next one was due."""
    with self._lock:
      return self._running().missed(self._slot(name))

  def close(self) -> None:
    with self._lock:
      if self._probes:
        self._probes.stop()
      self._probes = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _running(self) -> "_Native | Threaded":
    if self._probes is None:
      raise ValueError("the prober is closed; make a new one")
    return self._probes

  def _slot(self, name: int) -> int:
    if name not in self._slots:
      raise ValueError(
        f"target {name} is not watched; watched are {sorted(self._slots)}"
      )
    return self._slots[name]


class _Native:
  """A prober of `probe.c`."""

  def __init__(self, lib: Library, interval_s: float) -> None:
    self._lib = lib
    self._prober = lib.prober_start(interval_s)
    if self._prober is None:
      _check_code(-(ctypes.get_errno() or errno.EAGAIN), "a prober")

  def add(self, host: str, port: int) -> int:
    slot = self._lib.prober_add(self._prober, host.encode(), port)
    return _check_code(slot, f"a target at {host}:{port}")

  def remove(self, slot: int) -> None:
    self._lib.prober_remove(self._prober, slot)

  def silence_s(self, slot: int) -> float:
    return self._lib.prober_silence(self._prober, slot)

  def missed(self, slot: int) -> int:
    return self._lib.prober_missed(self._prober, slot)

  def stop(self) -> None:
    self._lib.prober_stop(self._prober)


def _compile(path: pathlib.Path) -> bool:
  """Whether there is a library at `path` now."""
  compiler = shlex.split(os.environ.get("CC") or "cc")
  flags = ["-std=c11", "-O2", "-shared", "-fPIC", "-pthread"]
  try:
    compiled_once(path, [*compiler, *flags, str(_SOURCE)], _COMPILE_S)
  except (OSError, subprocess.SubprocessError):
    return False
  return True


def _check_host(host: str) -> None:
  try:
    ipaddress.IPv4Address(host)
  except ValueError as error:
    raise ValueError(
      f"host is {host!r}; needed is a numeric IPv4 address"
    ) from error


def _check_code(code: int, what: str) -> int:
  """The code itself, if it isn't a negative errno."""
  if code < 0:
    raise OSError(-code, f"{os.strerror(-code)} ({what})")
  return code
