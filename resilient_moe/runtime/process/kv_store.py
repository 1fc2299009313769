"""A process that does nothing but mirror KV, for workers to stream to.

  python -m resilient_moe.runtime.process.kv_store \
    --fd=N --shape=L,2K,T,d --dtype=float32

It says its address on the inherited socket `fd`, and exits when that ends: so
it lives no longer than the process that started it. The key comes in hex in
RMOE_AUTHKEY, because everybody can read a command line. `--delay_s` is a fault,
a store that is slow to take what is streamed to it.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from resilient_moe.runtime.parent import as_parent, die_with_parent
from resilient_moe.runtime.process.data import DataServer
from resilient_moe.runtime.process.link import AUTHKEY, Address
from resilient_moe.runtime.process.mirror import KVMirror

HOST = "127.0.0.1"
START_S = 30.0  # an interpreter and numpy, on a loaded machine
MODULE = "resilient_moe.runtime.process.kv_store"


class StoreProcess:
  """A store that was started, seen from its parent."""

  def __init__(
    self, process: subprocess.Popen, end: socket.socket, address: Address
  ) -> None:
    self.process = process
    self.address = address
    self._end = end

  @property
  def alive(self) -> bool:
    return self.process.poll() is None

  def close(self) -> None:
    """Kills it and waits; what it mirrored is gone."""
    self._end.close()
    _kill(self.process)


def start(
  shape: Sequence[int], dtype: str, authkey: bytes, timeout_s: float = START_S,
  delay_s: float = 0.0,
) -> StoreProcess:  # fmt: skip
  """Starts a store for requests of `shape`, [L, 2K, T, d].

  It ends with the thread that calls this. `delay_s` is a fault: how long each
  message of a stream lies there unread.

  Raises:
    ConnectionError: it ended, or said no address within `timeout_s`.
  """
  ours, theirs = socket.socketpair()
  fd = theirs.fileno()
  sizes = ",".join(map(str, shape))
  with theirs:
    process = subprocess.Popen(
      [sys.executable, "-m", MODULE, f"--fd={fd}", f"--shape={sizes}",
       f"--dtype={dtype}", f"--delay_s={delay_s}"],
      pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
      env={**os.environ, **as_parent(), AUTHKEY: authkey.hex()},
      start_new_session=True,  # Ctrl-C is for the parent, which ends it
    )  # fmt: skip
  try:
    return StoreProcess(process, ours, _address(ours, timeout_s))
  except BaseException as error:
    ours.close()
    _kill(process)
    if isinstance(error, TimeoutError | ValueError):
      raise ConnectionError(
        f"the KV store said no address within {timeout_s} s "
        f"(exit code {process.returncode})"
      ) from error
    raise


def _address(end: socket.socket, timeout_s: float) -> Address:
  """Reads the line; an early end leaves half a one, a ValueError."""
  deadline_s = time.monotonic() + timeout_s
  line = b""
  while not line.endswith(b"\n"):
    end.settimeout(max(deadline_s - time.monotonic(), 0.001))
    piece = end.recv(1024)
    line += piece or b"ended\n"
  said = json.loads(line)
  return said["host"], said["port"]


def _kill(process: subprocess.Popen) -> None:
  with contextlib.suppress(ProcessLookupError):
    process.kill()
  process.wait()


def main(argv: Sequence[str] | None = None) -> None:
  """Serves until the other end of `fd` is gone."""
  die_with_parent()
  parser = argparse.ArgumentParser(description="Mirrors KV until `fd` ends.")
  parser.add_argument("--fd", type=int, required=True)
  parser.add_argument("--shape", required=True, help="L,2K,T,d")
  parser.add_argument("--dtype", required=True)
  parser.add_argument("--delay_s", type=float, default=0.0)
  options = parser.parse_args(argv)
  if AUTHKEY not in os.environ:
    parser.error(f"{AUTHKEY} is not set: the key in hex")
  shape = [int(size) for size in options.shape.split(",")]
  authkey = bytes.fromhex(os.environ[AUTHKEY])
  mirror = KVMirror(shape, options.dtype)
  server = DataServer(HOST, authkey, mirror, {}, options.delay_s)
  host, port = server.address
  with socket.socket(fileno=options.fd) as end:
    line = json.dumps({"host": host, "port": port}) + "\n"
    with contextlib.suppress(OSError):  # the parent may be gone by now
      end.sendall(line.encode())
      while end.recv(1024):
        pass
  os._exit(0)  # at once, whatever the server's threads are in


if __name__ == "__main__":
  main()
