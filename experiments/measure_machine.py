"""Measures this machine as a device of the cost model.

  python -m experiments.measure_machine --out=runs/machine.json
  python -m experiments.measure_machine --out=FILE --devices=4 --quick

Memory bandwidth, matrix products, cold reads of the disk, loopback sockets, a
process that imports jax. Writes JSON that `sim.hardware.measured` puts in the
place of what `this-machine` assumes; best of some rounds, all samples are
kept. The virtual devices of one process share the machine: each gets its
part of bandwidth and arithmetic. What only an engine can tell (compilation,
meshes, launches) stays as it is: `experiments/calibrate.py` fits that.
Expected: 20 seconds on an idle machine.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.provenance import provenance
from resilient_moe.report.runs import write_text

Samples = dict[str, list[float]]
MIB = 1 << 20


def _timed(work: Callable[[], Any]) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def memory_rates(nbytes: int, rounds: int) -> list[float]:
  """Bytes a second through memory: a copy reads and writes each once."""
  source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
  np.copyto(target, source)  # pages are mapped
  took = [_timed(lambda: np.copyto(target, source)) for _ in range(rounds)]
  return [2 * nbytes / t for t in took]


def matmul_rates(n: int, rounds: int) -> list[float]:
  """Operations a second of float32 products [n, n] @ [n, n]."""
  a, b = np.ones((n, n), np.float32), np.ones((n, n), np.float32)
  a @ b  # threads are started
  return [2 * n**3 / _timed(lambda: a @ b) for _ in range(rounds)]


def disk_rates(folder: pathlib.Path, nbytes: int, rounds: int) -> list[float]:
  """Bytes a second of reads that the page cache is told to forget.

  Not every file system forgets; then this is memory, and says too much.
  """
  content = np.random.default_rng(0).bytes(nbytes)
  rates = []
  with tempfile.NamedTemporaryFile(dir=folder) as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
    for _ in range(rounds):
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
      rates.append(nbytes / _timed(lambda: _read(file.name)))
  return rates


def _read(name: str) -> None:
  with open(name, "rb", buffering=0) as file:
    while file.read(4 * MIB):
      pass


def _connected() -> tuple[socket.socket, socket.socket]:
  """Both ends of a connection over loopback."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    near = socket.create_connection(server.getsockname())
    far, _ = server.accept()
  for end in (near, far):
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  return near, far


def loopback(nbytes: int, rounds: int) -> tuple[list[float], list[float]]:
  """Seconds one way of one byte, and bytes a second of many."""
  near, far = _connected()

  def serve() -> None:
    for _ in range(rounds):
      far.sendall(far.recv(1))
    for _ in range(rounds):
      left = nbytes
      while left:
        left -= len(far.recv(min(left, MIB)))
      far.sendall(b"x")

  other = threading.Thread(target=serve)
  other.start()
  with near, far:

    def ping() -> None:
      near.sendall(b"x")
      near.recv(1)

    latencies = [_timed(ping) / 2 for _ in range(rounds)]
    content = bytes(nbytes)

    def send() -> None:
      near.sendall(content)
      near.recv(1)

    rates = [nbytes / _timed(send) for _ in range(rounds)]
    other.join()
  return latencies, rates


def process_starts(code: str, rounds: int) -> list[float]:
  """Seconds until a fresh interpreter has run `code`."""
  command = [sys.executable, "-c", code]
  return [
    _timed(lambda: subprocess.run(command, check=True)) for _ in range(rounds)
  ]


def measure(folder: pathlib.Path, quick: bool = False) -> Samples:
  """Every sample, by figure."""
  rounds, scale = (2, 16) if quick else (5, 1)
  delays, sockets = loopback(64 * MIB // scale, rounds)
  start = process_starts("pass" if quick else "import jax", min(rounds, 3))
  return {
    "memory_bytes_per_s": memory_rates(256 * MIB // scale, rounds),
    "flops.fp32": matmul_rates(2_048 // scale, rounds),
    "disk.bytes_per_s": disk_rates(folder, 128 * MIB // scale, rounds),
    "inter.latency_s": delays,
    "inter.bytes_per_s": sockets,
    "process_start_s": start,
  }


def figures(samples: Samples, devices: int) -> dict[str, float]:
  """The numbers of one of `devices` virtual devices; best sample each.

  Raises:
    ValueError: no devices.
  """
  if devices < 1:
    raise ValueError(f"devices={devices}: at least 1")
  best = {
    name: min(s) if name.endswith("_s") and "per_s" not in name else max(s)
    for name, s in samples.items()
  }
  memory = best["memory_bytes_per_s"] / devices
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return {
    "memory_bytes": total / devices,
    "memory_bytes_per_s": memory,
    "flops.fp32": best["flops.fp32"] / devices,
    "flops.bf16": best["flops.fp32"] / devices,  # computed in fp32
    "devices_per_node": float(devices),
    # In one process devices are memory, and a copy is read and written.
    "intra.bytes_per_s": memory / 2,
    "host.bytes_per_s": memory / 2,
    "inter.latency_s": best["inter.latency_s"],
    "inter.bytes_per_s": best["inter.bytes_per_s"] / devices,
    "store.latency_s": best["inter.latency_s"],
    "store.bytes_per_s": best["inter.bytes_per_s"],
    "disk.bytes_per_s": best["disk.bytes_per_s"],
    "process_start_s": best["process_start_s"],
    "memory_efficiency": 1.0,  # these are rates that a program got
    "compute_efficiency": 1.0,
  }


def main(argv: Sequence[str]) -> int:
  """Does what a command line asks for; the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_string("out", None, "The JSON file.", flag_values=values)
  flags.DEFINE_integer("devices", 8, "Virtual devices.", flag_values=values)
  flags.DEFINE_bool("quick", False, "Tiny sizes.", flag_values=values)
  try:
    if values(list(argv))[1:] or not values.out:
      raise ValueError("needed is --out=FILE, and --devices=N or --quick")
    out = pathlib.Path(values.out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    samples = measure(out.parent, values.quick)
    found = figures(samples, values.devices)
  except (ValueError, OSError, flags.Error) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  origin = provenance(
    "experiments.measure_machine", argv, "emulated", values.devices
  )
  result = {
    "command": f"{origin['command']} ({origin['processor']})",
    "figures": found,
    "samples": samples,
    "provenance": origin,
  }
  write_text(out, json.dumps(result, indent=1) + "\n")
  for name, value in found.items():
    print(f"{name:22} {value:.4g}")
  print(f"In {out}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
