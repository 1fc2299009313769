"""All-to-all against all-gather, by the number of ranks."""

import pathlib

from experiments import bench_models as models
from experiments.bench_program import program
from experiments.bench_record import Cell, Result, paired, stat
from resilient_moe.model.config import DISPATCHES


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Times both dispatches' decode and chunk steps, interleaved."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  for name, model in settings.models.items():
    config = models.config_of(name, model, workdir)
    context = int(model.options["max_len"]) // 2
    for ranks in settings.dispatch_ranks:
      for step in ("decode", "chunk"):
        programs = {}
        for dispatch in DISPATCHES:
          options = {**model.options, "dispatch": dispatch}
          shape = models.shape_of(config, options, ranks)
          width = shape.options.chunk if step == "chunk" else 0
          programs[dispatch] = program(shape, ranks, width, context)
        found = models.interleaved(programs, settings.calls)
        samples |= {f"{name}/{ranks}/{step}/{d}": s for d, s in found.items()}
        rows.append(_row(name, ranks, step, found))
  note = "ratio: all_gather / all_to_all of neighbouring calls, [95%]"
  return Result("dispatch", rows, samples, (), (note,))


def _row(
  name: str, ranks: int, step: str, found: dict[str, list[float]]
) -> dict[str, Cell]:
  row: dict[str, Cell] = {"model": name, "ranks": ranks, "step": step}
  for dispatch, seconds in found.items():
    row[f"{dispatch} ms"] = 1e3 * stat(seconds).median
  ratio = stat(paired(found["all_gather"], found["all_to_all"]))
  row["ratio"] = ratio.median
  row["low"], row["high"] = ratio.low, ratio.high
  return row
