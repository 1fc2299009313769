"""What row-invariant numerics cost, against the fastest variant."""

import pathlib

from experiments import bench_models as models
from experiments.bench_program import program
from experiments.bench_record import Cell, Result, Target, stat

LIMIT = 1.2
DEFAULT = "native"
XLA: dict[str, int | str] = {"kernels": "xla"}
PLAIN = XLA | {"row_block": 0}  # promises no bits
# Fields of `StepOptions` on top of a model's own.
VARIANTS: dict[str, dict[str, int | str]] = {
  DEFAULT: {},
  "xla, row_block=32": XLA,
  "xla, row_block=8": XLA | {"row_block": 8},
  "xla, row_block=0": PLAIN,
  "xla, row_block=0, expert_block=32": PLAIN | {"expert_block": 32},
  "xla, row_block=0, expert_block=8": PLAIN | {"expert_block": 8},
  "xla, row_block=0, kv_block=256": PLAIN | {"kv_block": 256},
}
QUICK = (DEFAULT, "xla, row_block=0")


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Times every variant's decode and chunk steps, interleaved."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets = []
  names = QUICK if settings.calls < 5 else tuple(VARIANTS)
  for name, model in settings.models.items():
    config = models.config_of(name, model, workdir)
    context = int(model.options["max_len"]) // 2
    for step in ("decode", "chunk"):
      programs = {}
      for variant in names:
        options = {**model.options, **VARIANTS[variant]}
        shape = models.shape_of(config, options, settings.ranks)
        width = shape.options.chunk if step == "chunk" else 0
        programs[variant] = program(shape, settings.ranks, width, context)
      found = models.interleaved(programs, settings.calls)
      samples |= {f"{name}/{step}/{v}": s for v, s in found.items()}
      cost, fastest = _cost(found)
      rows += _rows(name, step, found)
      targets.append(Target(
        f"{name}, {step}: {DEFAULT} against the fastest ({fastest})", cost,
        LIMIT, "times",
      ))  # fmt: skip
  return Result("invariant", rows, samples, targets)


def _cost(found: dict[str, list[float]]) -> tuple[float, str]:
  """The default's median against the least, and whose that is."""
  medians = {v: stat(s).median for v, s in found.items()}
  fastest = min(medians, key=lambda v: medians[v])
  return medians[DEFAULT] / medians[fastest], fastest


def _rows(
  name: str, step: str, found: dict[str, list[float]]
) -> list[dict[str, Cell]]:
  base = stat(found[DEFAULT]).median
  rows: list[dict[str, Cell]] = []
  for variant, seconds in found.items():
    s = stat(seconds)
    rows.append({
      "model": name, "step": step, "variant": variant,
      "median ms": 1e3 * s.median, "low": 1e3 * s.low, "high": 1e3 * s.high,
      "default costs": base / s.median,
    })  # fmt: skip
  return rows


