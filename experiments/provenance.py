"""Where a result comes from: commit, command, versions, machine."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import resilient_moe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = (
  "jax",
  "jaxlib",
  "numpy",
  "orbax-checkpoint",
  "ml-collections",
  "matplotlib",
)


def provenance(
  module: str, argv: Sequence[str], runtime: str, ranks: int
) -> dict[str, Any]:
  """Everything about this start that a config doesn't say.

  Args:
    module: what was started, as after `python -m`.
    argv: its command line, as `sys.argv`.
    runtime: of the config; what the devices are follows from it.
    ranks: of the config.
  """
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join(["python", "-m", module, *argv[1:]]),
    "commit": _git("rev-parse", "HEAD"),
    "dirty": _dirty(),
    "device_kind": _device_kind(runtime, ranks),
    "platform": platform.platform(),
    "processor": _processor(),
    "cores": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count(),
    "kernels": _kernels(runtime),
    "versions": versions(),
  }


def versions() -> dict[str, str]:
  """What the numbers depend on besides the commit."""
  found = {"python": platform.python_version()}
  found["resilient_moe"] = resilient_moe.__version__
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found


def _git(*arguments: str) -> str | None:
  """What git says about the code that runs; None outside a clone."""
  try:
    done = subprocess.run(
      ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None


def _dirty() -> bool | None:
  """Whether the code differs from the commit; None if nobody knows."""
  changes = _git("status", "--porcelain")
  return None if changes is None else bool(changes)


def _device_kind(runtime: str, ranks: int) -> str:
  where = os.environ.get("JAX_PLATFORMS") or "cpu"
  if runtime == "emulated":
    return f"{ranks} virtual devices in one process, emulated on {where}"
  if runtime == "process":
    return f"{ranks} operating-system processes of this machine ({where})"
  if runtime == "simulated":
    return f"none: {ranks} simulated ranks in virtual time"
  return f"{ranks} {runtime} ranks on one device ({where})"


def _kernels(runtime: str) -> str:
  """What computes on CPU in float32; machines may have no compiler."""
  if runtime == "simulated":
    return "none"
  from resilient_moe.model import native

  why = native.register()
  return f"XLA's, because: {why}" if why else "native"


def _processor() -> str:
  """The CPU's name, as far as it can be known."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [x.partition(":")[2].strip() for x in lines if "model name" in x]
  return names[0] if names else platform.processor() or platform.machine()
