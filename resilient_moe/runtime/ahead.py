"""Compiles step programs ahead of time, in a process of low priority.

  python -m resilient_moe.runtime.ahead idle|now STORE N_DEVICES [SIZE ...]

`idle` stands back behind everybody else; `now` is for a start that waits.
Serving goes on meanwhile: a thread would share the interpreter lock and the
cores with it. Measured (bench `ready`): beside a process of nice 19 decode
takes 1.35 times as long, beside one that the scheduler counts as idle 1.01.
"""

import concurrent.futures
import os
import pathlib
import subprocess
import sys

from resilient_moe.runtime.parent import as_parent, die_with_parent

SHAPE_FILE = "shape.json"


def start(
  store: pathlib.Path, n_devices: int, sizes: list[int], when: str = "idle"
) -> subprocess.Popen:
  """Starts the compiler process; it ends by itself. `when`: idle or now."""
  command = [sys.executable, "-m", __name__, when, str(store), str(n_devices)]
  return subprocess.Popen(
    command + [str(s) for s in sizes], stdin=subprocess.DEVNULL,
    env={**os.environ, **as_parent(), "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def main(
  when: str, store: pathlib.Path, n_devices: int, sizes: list[int]
) -> None:
  """Fills the store: programs of a rank, steps of each mesh size.

  Without a size: the programs of attention ranks and of expert ranks.
  """
  die_with_parent()
  if when == "idle":
    _stand_back()
  import jax

  jax.config.update("jax_num_cpu_devices", n_devices)
  from resilient_moe.mesh.executables import Executables, read_shape

  shape = read_shape(store / SHAPE_FILE)
  executables = Executables(shape, store)
  if not sizes:
    from resilient_moe.runtime.split.families import compile_families

    compile_families(executables, jax.devices()[0])
    return
  jobs = [(c, jax.devices()[:s]) for s in sizes for c in shape.chunks()]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    ranks = pool.submit(executables.rank_programs, jax.devices()[0])
    list(pool.map(lambda job: executables.compile_for(*job), jobs))
    ranks.result()


def _stand_back() -> None:
  """Runs only where nobody else wants to: serving preempts it at once."""
  os.nice(19)
  if hasattr(os, "SCHED_IDLE"):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
  main(
    sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]),
    [int(s) for s in sys.argv[4:]],
  )  # fmt: skip
