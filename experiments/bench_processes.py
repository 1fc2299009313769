"""A decode step on operating-system processes: where its time goes.

The collectives' part is what a step's program takes on all ranks beyond what
it takes where every rank is a mesh of its own, all of them at the same time on
the same cores. The host's part is the rest: the supervisor schedules and
calls, the worker puts the batch on its device and answers.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import bench_models as models
from experiments.bench_engine import Engine
from experiments.bench_ready import making_ready, usual_steps
from experiments.bench_record import Cell, Result, Target, stat
from resilient_moe.runtime.instance import packed
from resilient_moe.serving.state import SchedulerState

POLICY = "mesh_shrink"
RANKS = 4
LIMIT = 1.5  # decode while meshes are made ready


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Steps taken apart, and steps beside readiness; for each model."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets = []
  ranks = min(RANKS, settings.ranks)
  for name, model in settings.models.items():
    kwargs = {"ready": "none"}
    engine = Engine(name, model, settings, workdir, POLICY, kwargs, ranks)
    try:
      state = engine.decoding()
      found = _parts(engine, state, settings)
      usual = usual_steps(engine, state, settings)
      compiling, running, took_s = making_ready(engine, state, settings)
      usual += usual_steps(engine, state, settings)
    finally:
      engine.close()
    meanwhile = compiling + running
    found |= {"usual": usual, "meanwhile": meanwhile}
    samples |= {f"{name}/{k}": v for k, v in found.items()}
    slower = float(np.mean(meanwhile) / np.mean(usual))
    rows.append(_row(name, ranks, found, took_s) | {
      "meanwhile, mean ratio": slower,
      "meanwhile, median ratio": stat(meanwhile).median / stat(usual).median,
    })  # fmt: skip
    targets.append(Target(
      f"{name}: mean decode while {ranks} meshes are made ready", slower,
      LIMIT, "times the usual",
    ))  # fmt: skip
  note = (
    f"{ranks} worker processes on this machine's cores; medians of a step's "
    "parts, each of the slowest rank"
  )
  return Result("processes", rows, samples, targets, (note,))


def _row(
  name: str, ranks: int, found: Mapping[str, list[float]], took_s: float
) -> dict[str, Cell]:
  ms = {k: 1e3 * stat(v).median for k, v in found.items()}
  return {
    "model": name, "ranks": ranks, "step ms": ms["step"],
    "compute ms": ms["alone"],
    "collectives ms": ms["program"] - ms["alone"],
    "worker's host work ms": ms["own"],
    "supervisor and messages ms": ms["step"] - ms["program"] - ms["own"],
    "ready took s": took_s,
  }  # fmt: skip


def _parts(
  engine: Engine, state: SchedulerState, settings: models.Settings
) -> dict[str, list[float]]:
  """Seconds of steps and of their parts, interleaved with steps alone."""
  backend = engine.backend
  found: dict[str, list[float]] = {
    "step": [], "own": [], "program": [], "alone": []
  }  # fmt: skip
  backend.readiness.wait_compiled(1)
  for _ in range(settings.pairs):
    now = state
    for _ in range(settings.block_steps):
      seconds, now = engine.step(now, lambda: None)
      found["step"].append(seconds)
      found["own"].append(max(own for own, _ in backend.parts.values()))
      found["program"].append(max(p for _, p in backend.parts.values()))
    found["alone"] += _alone(engine, state, settings.block_steps)
  # The first step of a block sends the routing table again.
  return {k: v[1:] for k, v in found.items()}


def _alone(engine: Engine, state: SchedulerState, count: int) -> list[float]:
  """Seconds in the program where each rank is a mesh of its own."""
  backend: Any = engine.backend
  ints = packed(engine.batch(state))
  mesh = backend.facts.mesh
  tell: dict[int, Any] = {
    r: {"routing": backend.routing_of(np.array([r], np.int32))} for r in mesh
  }
  backend.crew.tell(tell, "routing")
  calls = {
    r: {"mesh": (r,), "width": 0, "ints": ints[i : i + 1]}
    for i, r in enumerate(mesh)
  }
  found = []
  for _ in range(count + 1):
    said = backend.crew.call(calls, "step").good()
    found.append(max(values[2] for values in said.values()))
  backend.changed()  # the next step sends its own table
  return found[1:]
