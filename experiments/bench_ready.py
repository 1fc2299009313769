"""Decode while every mesh without one rank is made ready behind traffic."""

import pathlib
import time

from experiments import bench_models as models
from experiments.bench_engine import Engine, shared
from experiments.bench_record import Cell, Result, Target, stat
from resilient_moe.recovery import load
from resilient_moe.serving.state import SchedulerState

LIMIT = 1.2
MOST_S = 600.0  # of making ready, until this gives up
POLICY = "mesh_shrink"


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Usual steps, steps meanwhile, usual steps again; for each model."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets = []
  for name, model in settings.models.items():
    engine = shared(name, model, settings, workdir)
    # Its own checkpoints would add to what is measured.
    engine.backend.checkpointer, kept = None, engine.backend.checkpointer
    state = engine.decoding()
    before = _rss()
    usual = usual_steps(engine, state, settings)
    compiling, running, took_s = making_ready(engine, state, settings)
    usual += usual_steps(engine, state, settings)
    found = {"usual": usual, "compiling": compiling, "running": running}
    samples |= {f"{name}/{k}": v for k, v in found.items()}
    base = stat(usual).median
    meanwhile = stat(compiling + running)
    rows.append({
      "model": name, "meshes": settings.ranks, "usual ms": 1e3 * base,
      "meanwhile ms": 1e3 * meanwhile.median,
      "ratio": meanwhile.median / base, "low": meanwhile.low / base,
      "high": meanwhile.high / base,
      "compiling ratio": stat(compiling).median / base if compiling else None,
      "running ratio": stat(running).median / base if running else None,
      "running max ms": 1e3 * max(running, default=0.0), "took s": took_s,
      "stored MB": _stored(engine.scratch) / 1e6,
      "memory MB": (_rss() - before) / 1e6,
    })  # fmt: skip
    targets.append(Target(
      f"{name}: median decode while {settings.ranks} meshes are made ready",
      meanwhile.median / base, LIMIT, "times the usual",
    ))  # fmt: skip
    engine.backend.checkpointer = kept
  note = (
    "compiling: a low-priority process compiles; running: each mesh's "
    "programs are run once, one between two steps, which the step's time "
    "includes"
  )
  return Result("ready", rows, samples, targets, (note,))


def usual_steps(
  engine: Engine, state: SchedulerState, settings: models.Settings
) -> list[float]:
  """Seconds of steps with nothing beside them."""
  found: list[float] = []
  for _ in range(settings.pairs):
    found += engine.steps(state, settings.block_steps)
  return found


def making_ready(
  engine: Engine, state: SchedulerState, settings: models.Settings
) -> tuple[list[float], list[float], float]:
  """Steps until all are ready: while compiling, with a program run; seconds."""
  backend = engine.backend
  standing = load(POLICY).prepare(backend.view())
  compiling: list[float] = []
  running: list[float] = []
  start = time.monotonic()
  backend.readiness.want(backend.view().launched, standing.ready)
  while not backend.readiness.done:
    if time.monotonic() - start > MOST_S:
      raise RuntimeError(f"meshes are not ready after {MOST_S:.0f} s")
    now = state  # a block begins anew: contexts as in the usual steps
    for _ in range(settings.block_steps):
      works = backend.readiness.working
      seconds, now = engine.step(now, backend.poll)
      time.sleep(settings.pause_s)
      (running if works else compiling).append(seconds)
  return compiling, running, time.monotonic() - start


def _rss() -> float:
  """Bytes of memory that this process has; 0 where nobody says."""
  file = pathlib.Path("/proc/self/statm")
  return float(file.read_text().split()[1]) * 4096 if file.exists() else 0.0


def _stored(folder: pathlib.Path) -> float:
  """Bytes of the stored executables."""
  files = (folder / "executables").glob("*")
  return float(sum(f.stat().st_size for f in files))
