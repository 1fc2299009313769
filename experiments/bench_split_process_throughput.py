"""The same on processes: attention and experts apart, and together.

The engines stand beside each other and take turns; who has none waits.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

from experiments import bench_models as models
from experiments import bench_split as split
from experiments.bench_record import Cell, Result, paired, stat
from resilient_moe.serving.scheduler import StepBatch

APART = "apart"
OWN, WAITED, STEP = "own", "waited", "step"
Found = dict[str, dict[str, list[float]]]  # by engine and part


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Interleaved blocks of every engine; for each model."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  for name, model in settings.apart().items():
    with _engines(name, model, settings, workdir) as engines:
      found = measured(engines, settings)
    for key, parts in found.items():
      ratio = stat(paired(parts["rate"], found[APART]["rate"]))
      rows.append({"model": name} | row(key, parts) | {
        "of apart's": ratio.median, "low": ratio.low, "high": ratio.high,
      })  # fmt: skip
      samples |= {f"{name}/{key}/{k}": v for k, v in parts.items()}
  note = (
    "equal: model and rows in all, every row busy, no policy; ms of a step: "
    "of an attention worker, or of the mesh's slowest rank; programs wait for "
    "experts, or for the others in collectives; the rest: the supervisor "
    "schedules and calls, others have the cores"
  )
  return Result("split_process_throughput", rows, samples, (), (note,))


@contextlib.contextmanager
def _engines(
  name: str, model: models.Model, settings: models.Settings,
  workdir: pathlib.Path,
) -> Iterator[dict[str, split.Driven]]:  # fmt: skip
  n, aws = settings.split.ranks, settings.split.attention
  kinds = {APART: (n, aws)}
  kinds |= {f"{m} together": (m, 0) for m in settings.split.processes}
  total = split.same_rows(settings, model)
  with contextlib.ExitStack() as stack:
    engines = {}
    for key, (ranks, attention) in kinds.items():
      engines[key] = split.open_engine(
        name, model, settings, workdir, attention=attention, ranks=ranks,
        rows=total // (attention or ranks), processes=True,
      )  # fmt: skip
      stack.callback(engines[key].close)
      split.say(f"{name}, {key}: {ranks} workers are up")
    yield engines


def measured(
  engines: Mapping[str, split.Driven], settings: models.Settings
) -> Found:
  """Tokens/s of each block, and the parts of its steps."""
  states = {key: engine.decoding() for key, engine in engines.items()}
  parts = ("rate", OWN, WAITED, STEP)
  found: Found = {key: {part: [] for part in parts} for key in engines}
  for pair in range(-1, settings.pairs):
    for key in list(engines)[:: 1 if pair % 2 else -1]:
      engine, seconds = engines[key], found[key]
      if pair < 0:  # the first one warms up
        engine.block(states[key], settings.split.block_steps)
        continue

      def ended(
        batch: StepBatch, step_s: float, engine: split.Driven = engine,
        seconds: dict[str, list[float]] = seconds,
      ) -> None:  # fmt: skip
        each = [engine.backend.parts[rank] for rank in batch.mesh]
        seconds[STEP].append(step_s)
        seconds[OWN].append(max(own for own, _ in each))
        seconds[WAITED].append(max(waited for _, waited in each))

      spent, tokens = engine.block(
        states[key], settings.split.block_steps, ended
      )
      seconds["rate"].append(tokens / spent)
    split.say(f"block {pair + 1} of {settings.pairs}")
  return found


def row(key: str, parts: Mapping[str, list[float]]) -> dict[str, Cell]:
  """Medians of one engine."""
  ms = {k: 1e3 * stat(v).median for k, v in parts.items() if k != "rate"}
  apart = key == APART
  return {
    "experts": key, "tokens/s": stat(parts["rate"]).median,
    "step ms": ms[STEP],
    "own compute ms": ms[OWN] if apart else None,
    "waits for experts ms": ms[WAITED] if apart else None,
    "own host work ms": None if apart else ms[OWN],
    "program with collectives ms": None if apart else ms[WAITED],
    "the rest ms": ms[STEP] - ms[OWN] - ms[WAITED],
  }
