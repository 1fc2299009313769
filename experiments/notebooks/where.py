"""Where the ranks of a notebook live: picked before JAX is loaded."""

import os
import subprocess
import sys
from typing import NamedTuple

_ASK = "import jax; print(jax.default_backend(), jax.device_count())"


class Place(NamedTuple):
  """What a notebook runs on.

  Attributes:
    backend: of JAX: cpu, gpu or tpu.
    devices: how many of it there are.
    runtime: for experiments.run, whose engines are processes of their own.
  """

  backend: str
  devices: int
  runtime: str

  def __str__(self) -> str:
    ranks = (
      "one virtual CPU device a rank" if self.runtime == "emulated"
      else "all ranks on the first device"
    )  # fmt: skip
    return f"{self.devices} x {self.backend}; engines: {self.runtime}, {ranks}"


def pick(ranks: int) -> Place:
  """Looks which devices there are, and sets this process up for `ranks`.

  On CPU each rank gets a virtual device. A GPU is shared with the engines'
  processes, on which the ranks are logical ones. A TPU belongs to one process,
  this one: `rm.generate` uses it, engine processes emulate ranks on CPU.
  """
  # Before anything imports jax here; a rank more for a spare.
  os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(ranks + 1))
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return Place("cpu", int(os.environ["JAX_NUM_CPU_DEVICES"]), "emulated")
  # Another process asks, so that this one holds no device yet.
  done = subprocess.run(
    [sys.executable, "-c", _ASK], capture_output=True, text=True, check=True
  )
  backend, devices = done.stdout.split()[-2:]
  runtime = "logical" if backend in ("gpu", "cuda", "rocm") else "emulated"
  return Place(backend, int(devices), runtime)
