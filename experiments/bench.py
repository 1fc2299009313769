"""Measures what the project promises, as ratios within one run.

  python -m experiments.bench --config=configs/bench.py --workdir=DIR \
      [--config.only=stall,checkpoint] [--config.only_models=shipped] \
      [--config.quick=True]

Each benchmark prints a small table and writes DIR/<name>.json with its
samples; the end is DIR/bench.md: target, measured, met.
  stall       affected stall by action, beside a restart's stages
  checkpoint  decode with KV checkpointing on against off
  invariant   what row-invariant numerics cost
  plan        planning at 10,240 ranks
  cache       step time and bytes against unused cache
  ready       decode while meshes are made ready
  dispatch    all-to-all against all-gather
  layout      slots against gathered pages
  steps       where a decode step's host time goes
  processes   the same on operating-system processes, and what readiness takes
And of attention and experts apart (disaggregated):
  split_throughput          decode against collocated, and where its time goes
  split_process_throughput  the same on operating-system processes
  split_checkpoint          the KV store's cost and its bytes, on processes
  split_restore             KV from the store against running a request again
  split_pingpong            two half batches in turn against a whole one
  split_stall               waits after killed workers, beside a restart

Exit status: 0 (also where a target is missed: bench.md says so); 2 for bad
input.
"""

import importlib
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from experiments import bench_engine, launch
from experiments import bench_models as models
from experiments import bench_record as record
from experiments.provenance import provenance
from resilient_moe.report.runs import write_text

# What measures is `run(settings, workdir) -> Result` of a module.
BENCHMARKS = {
  name: f"experiments.bench_{name}"
  for name in (
    "plan",
    "invariant",
    "dispatch",
    "layout",
    "cache",
    "steps",
    "checkpoint",
    "ready",
    "stall",
    "processes",
    "split_throughput",
    "split_process_throughput",
    "split_checkpoint",
    "split_restore",
    "split_pingpong",
    "split_stall",
  )
}


def chosen(only: str | Sequence[str]) -> list[str]:
  """The benchmarks that a config asks for, in our order.

  Raises:
    ValueError: one of them is unknown.
  """
  asked = models.listed(only)
  for name in asked:
    if name not in BENCHMARKS:
      raise ValueError(
        f"config.only: unknown benchmark {name!r}; choices: "
        f"{', '.join(BENCHMARKS)}"
      )
  return [name for name in BENCHMARKS if not asked or name in asked]


def run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  argv: Sequence[str] = ("bench",),
) -> list[record.Result]:
  """Runs the chosen benchmarks; writes and prints what they found."""
  settings, names = models.read(config), chosen(config.only)
  workdir.mkdir(parents=True, exist_ok=True)
  origin: dict[str, Any] = provenance(
    "experiments.bench", argv, "emulated", settings.ranks
  )
  origin["config"] = config.to_dict()
  results = []
  for name in names:
    start = time.monotonic()
    # These have engines of their own, and the machine for them.
    if name in ("stall", "processes") or name.startswith("split_"):
      bench_engine.close_all()
    result = importlib.import_module(BENCHMARKS[name]).run(settings, workdir)
    results.append(result)
    record.write(result, workdir, origin)
    print(record.text(result))
    print(f"({name}: {time.monotonic() - start:.0f} s)\n", flush=True)
  bench_engine.close_all()
  summary = record.table(record.target_rows(results))
  parts = [f"# Benchmarks\n\n`{origin['command']}`\n", summary]
  parts += ["\n" + record.text(result) for result in results]
  write_text(workdir / "bench.md", "\n".join(parts))
  print(f"{summary}\n\nIn {workdir}: bench.md, {', '.join(names)} (.json)")
  return results


def main(argv: Sequence[str]) -> int:
  """Parses the command line and runs; the exit status."""
  try:
    config, workdir = launch.parse(argv, "configs/bench.py")
    settings = models.read(config)
    apart = settings.split.devices
    needed = max(settings.ranks, apart, *settings.dispatch_ranks)
    jax.config.update("jax_num_cpu_devices", needed)
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)  # orbax tells much
    run(config, workdir, argv)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
