"""What KV checkpointing costs a decode step, in interleaved blocks."""

import pathlib
import time

from experiments import bench_models as models
from experiments.bench_engine import Engine, shared
from experiments.bench_record import Cell, Result, Target, paired, stat
from resilient_moe.model.step import cache_shape
from resilient_moe.runtime.kv_checkpoint import KVCheckpointer
from resilient_moe.serving.state import SchedulerState

LIMIT_PERCENT = 3.0
MODES = ("peer", "host")


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Off against peer and host for each model."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets = []
  for name, model in settings.models.items():
    engine = shared(name, model, settings, workdir)
    engine.backend.checkpointer, kept = None, engine.backend.checkpointer
    state = engine.decoding()
    for mode in MODES:
      found = _pairs(engine, state, mode, settings)
      samples |= {f"{name}/{mode}/{k}": v for k, v in found.items()}
      ratio = stat(paired(found["on"], found["off"]))
      slower = 100 * (ratio.median - 1)
      rows.append({
        "model": name, "mode": mode,
        "off ms": 1e3 * stat(found["off"]).median,
        "on ms": 1e3 * stat(found["on"]).median,
        "slower %": slower, "low %": 100 * (ratio.low - 1),
        "high %": 100 * (ratio.high - 1), "pairs": ratio.n,
        "KB a step": stat(found["bytes"]).median / 1e3,
        "lag steps": stat(found["lag"]).median,
      })  # fmt: skip
      targets.append(Target(
        f"{name}, {mode}: decode with KV checkpointing on", slower,
        LIMIT_PERCENT, "% slower",
      ))  # fmt: skip
    engine.backend.checkpointer = kept
  note = (
    f"a block: {settings.block_steps} decode steps from the same state, and "
    "the time until the last one is mirrored; off and on take turns at being "
    "first"
  )
  return Result("checkpoint", rows, samples, targets, (note,))


def _pairs(
  engine: Engine, state: SchedulerState, mode: str, settings: models.Settings
) -> dict[str, list[float]]:
  """Seconds a step of paired blocks; lag and bytes of the blocks with it on."""
  checkpointer = _checkpointer(engine, mode)
  found: dict[str, list[float]] = {"on": [], "off": [], "lag": [], "bytes": []}
  # The mirror's pages are touched once beforehand, as in a long run.
  for pair in range(-1, settings.pairs):
    for on in (True, False) if pair % 2 else (False, True):
      engine.backend.checkpointer = checkpointer if on else None
      before = checkpointer.nbytes_streamed
      start = time.perf_counter()
      engine.steps(state, settings.block_steps)
      lag = checkpointer.lag_steps()
      checkpointer.drain()
      seconds = (time.perf_counter() - start) / settings.block_steps
      if pair < 0:
        continue
      found["on" if on else "off"].append(seconds)
      if on:
        sent = checkpointer.nbytes_streamed - before
        found["lag"].append(float(lag))
        found["bytes"].append(sent / settings.block_steps)
  engine.backend.checkpointer = None
  checkpointer.close()
  return found


def _checkpointer(engine: Engine, mode: str) -> KVCheckpointer:
  """One that holds every position which the requests have so far.

  Its first steps lie behind a gap (the prompts), so they are stored by hand.
  """
  plans, backend = engine.plans, engine.backend
  n_layers, _, rows, heads, length, d = cache_shape(
    plans.config, plans.shape.options
  )
  mesh = backend.facts.mesh
  made = KVCheckpointer(
    mode, (n_layers, heads, length, d), plans.config.dtype, rows * len(mesh),
    _fail,
  )  # fmt: skip
  for name, place in backend.seats.items():
    kv = backend.store.read_row(place.rank, place.row, place.tokens)
    made.rebase(name, kv, made.holder(mesh, mesh.index(place.rank)))
  return made


def _fail(text: str) -> None:
  """A warning would mean that less was measured than is said."""
  raise RuntimeError(text)
