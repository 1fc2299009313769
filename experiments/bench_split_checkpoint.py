"""What KV checkpoints to the store cost on processes, in time and in bytes.

Bytes, after Tarragon: a token and layer takes 2 * H_kv * d numbers in the
checkpoint and, where each expert gets its own copy, 2 * k * D on the links to
the experts and back: 1 / 8 for Mixtral-8x7B.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from experiments import bench_models as models
from experiments import bench_split as split
from experiments.bench_record import Cell, Result, Target, paired, stat
from resilient_moe.model.config import ModelConfig
from resilient_moe.serving.state import SchedulerState

POLICY = "tarragon"
SLOWER_PERCENT = 2.0
OFF_PERCENT = 5.0  # of the formula
MIXTRAL_LIKE = "mixtral-like"
WARM_STEPS = 4
SETTLED_S, PATIENCE_S = 0.1, 20.0


class Bytes(NamedTuple):
  """Of so many decode steps of everybody."""

  kv: int
  exchanged: int  # embeddings, there and back


def formula(config: ModelConfig) -> float:
  """Checkpoint bytes over exchange bytes where nothing is shared."""
  kv = config.kv_heads * config.kv_width
  return kv / (2 * config.top_k * config.d_model)


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Time with it on and off; bytes beside the formula, two shapes."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets = []
  for name, model in settings.apart().items():
    like = dataclasses.replace(model, checkpoint="", model=settings.split.shape)
    for key, each in ((name, model), (f"{name}-{MIXTRAL_LIKE}", like)):
      for dedup in (True, False):
        with _engine(key, each, settings, workdir, dedup) as engine:
          state = engine.decoding()
          if key == name and dedup:
            found = pairs(engine, state, settings)
            samples |= {f"{name}/{k}": v for k, v in found.items()}
            time_row, target = _slower(name, found)
            rows.append(time_row)
            targets.append(target)
          counted = count(engine, state, settings.split.block_steps)
          byte_row, off = _bytes(key, engine.plans.config, dedup, counted)
          rows.append(byte_row)
          if not dedup:
            targets.append(Target(
              f"{key}: checkpoint over exchange bytes against the formula",
              off, OFF_PERCENT, "% off",
            ))  # fmt: skip
  note = (
    f"time: blocks of {settings.split.block_steps} decode steps of every "
    "attention worker from the same state, streamed to the store or nowhere, "
    "in turns; lag: steps that are not sent yet at a block's end"
  )
  return Result("split_checkpoint", rows, samples, targets, (note,))


@contextlib.contextmanager
def _engine(
  name: str, model: models.Model, settings: models.Settings,
  workdir: pathlib.Path, dedup: bool,
) -> Iterator[split.Driven]:  # fmt: skip
  n, aws = settings.split.ranks, settings.split.attention
  engine = split.open_engine(
    name, model, settings, workdir, attention=aws, ranks=n,
    rows=split.same_rows(settings, model) // aws, processes=True,
    policy=POLICY, exchange={"dedup": dedup}, tag=f"dedup{dedup:d}",
  )  # fmt: skip
  split.say(f"{name}, deduplication {'on' if dedup else 'off'}: up")
  try:
    yield engine
  finally:
    engine.close()


def pairs(
  engine: split.Driven, state: SchedulerState, settings: models.Settings
) -> dict[str, list[float]]:
  """Seconds a step of paired blocks, and the lag of those with it on."""
  found: dict[str, list[float]] = {"on": [], "off": [], "lag": []}
  steps = settings.split.block_steps
  # The same positions again and again: what the store has stays whole.
  for pair in range(-1, settings.pairs):
    for on in (True, False) if pair % 2 else (False, True):
      stream(engine, on)
      engine.block(state, min(WARM_STEPS, steps))
      seconds, _ = engine.block(state, steps)
      if pair < 0:
        continue
      found["on" if on else "off"].append(seconds / steps)
      if on:
        found["lag"].append(float(engine.backend.kv._lag))
        settled_kv(engine)
    split.say(f"pair {pair + 1} of {settings.pairs}")
  stream(engine, on=True)
  return found


def stream(engine: split.Driven, on: bool) -> None:
  """Everybody's KV goes to the store from now on, or nowhere."""
  backend = engine.backend
  calls = {
    rank: {"address": backend.kv._address(-1, rank) if on else None}
    for (rank,) in backend.domains()
  }
  backend.crew.tell(calls, "stream_to")


def settled_kv(engine: split.Driven) -> int:
  """KV bytes sent so far, once no more are on their way."""
  backend = engine.backend
  everybody: dict[int, dict] = {rank: {} for (rank,) in backend.domains()}
  deadline = time.monotonic() + PATIENCE_S
  before = -1
  while time.monotonic() < deadline:
    said = backend.crew.call(everybody, "done").good()
    if before == (now := sum(said.values())):
      return now
    before = now
    time.sleep(SETTLED_S)
  raise RuntimeError(f"KV is still being sent after {PATIENCE_S:.0f} s")


def count(engine: split.Driven, state: SchedulerState, steps: int) -> Bytes:
  """Bytes of decode steps of everybody."""
  def so_far() -> Bytes:
    everybody: dict[int, dict] = {r: {} for (r,) in engine.backend.domains()}
    said = engine.backend.crew.call(everybody, "traffic").good()
    return Bytes(settled_kv(engine), sum(map(sum, said.values())))

  engine.block(state, 1)  # the store has a link to everybody
  before = so_far()
  engine.block(state, steps)
  after = so_far()
  return Bytes(after.kv - before.kv, after.exchanged - before.exchanged)


def _slower(
  name: str, found: dict[str, list[float]]
) -> tuple[dict[str, Cell], Target]:
  ratio = stat(paired(found["on"], found["off"]))
  percent = [100 * (r - 1) for r in (ratio.median, ratio.low, ratio.high)]
  row: dict[str, Cell] = {
    "model": name, "off ms": 1e3 * stat(found["off"]).median,
    "on ms": 1e3 * stat(found["on"]).median, "slower %": percent[0],
    "low %": percent[1], "high %": percent[2], "pairs": ratio.n,
    "lag steps": stat(found["lag"]).median,
  }  # fmt: skip
  return row, Target(
    f"{name}: decode with KV streamed to the store", percent[0],
    SLOWER_PERCENT, f"% slower [{percent[1]:.1f}, {percent[2]:.1f}]",
  )  # fmt: skip


def _bytes(
  name: str, config: ModelConfig, dedup: bool, counted: Bytes
) -> tuple[dict[str, Cell], float]:
  """A row, and how far the ratio is off the formula in percent."""
  ratio, expected = counted.kv / counted.exchanged, formula(config)
  off = 100 * abs(ratio / expected - 1)
  return {
    "model": name, "deduplication": dedup, "KV KB": counted.kv / 1e3,
    "exchanged KB": counted.exchanged / 1e3, "KV/exchanged %": 100 * ratio,
    "formula %": 100 * expected, "off %": off,
  }, off  # fmt: skip
