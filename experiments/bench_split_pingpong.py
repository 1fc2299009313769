"""Micro-batches in ping-pong (after MegaScale-Infer) on the emulated runtime.

Whole: one attention rank steps with all rows. Halves: two ranks with half of
them each, in two threads: one attends while the other's tokens are with the
experts; or one after the other, which tells what smaller batches cost. Programs
run outside Python's lock, so threads overlap as far as there are idle cores.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments import bench_models as models
from experiments import bench_split as split
from experiments.bench_record import Cell, Result, paired, stat
from resilient_moe.runtime.instance import packed

WHOLE, PINGPONG, IN_TURN = "whole", "ping-pong", "in turn"


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """All three over several batch sizes, in turns; for each model."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  for name, model in settings.apart().items():
    for size in settings.split.pingpong_rows:
      found = measured(name, model, settings, workdir, size)
      rows.append({"model": name, "rows": size, **row(found)})
      samples |= {f"{name}/{size}/{key}": v for key, v in found.items()}
      split.say(f"{name}: {size} rows")
  note = (
    f"ms of one decode step of all rows, {settings.split.ranks} expert and "
    f"attention devices, {os.cpu_count()} cores; ratios above 1: faster than "
    "the whole batch"
  )
  return Result("split_pingpong", rows, samples, (), (note,))


def measured(
  name: str, model: models.Model, settings: models.Settings,
  workdir: pathlib.Path, size: int,
) -> dict[str, list[float]]:  # fmt: skip
  """Seconds of a step of `size` rows each way, a sample for each block."""
  experts = settings.split.ranks - settings.split.attention
  workload = {**model.workload, "count": size}
  model = dataclasses.replace(model, workload=workload)
  with contextlib.ExitStack() as stack:
    def opened(aws: int) -> split.Driven:
      engine = split.open_engine(
        name, model, settings, workdir, attention=aws, ranks=aws + experts,
        rows=size // aws, tag="pingpong",
      )  # fmt: skip
      stack.callback(engine.close)
      return engine

    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(2))
    whole, halves = _steps(opened(1)), _steps(opened(2))
    ways = {
      WHOLE: lambda n: [step(n) for step in whole],
      IN_TURN: lambda n: [step(n) for step in halves],
      PINGPONG: lambda n: list(pool.map(lambda step: step(n), halves)),
    }
    return interleaved(ways, settings.pairs, settings.block_steps)


def _steps(engine: split.Driven) -> list[Callable[[int], None]]:
  """What runs so many decode steps, for each attention rank."""
  state, store = engine.decoding(), engine.backend.store

  def stepping(rank: int) -> Callable[[int], None]:
    ints = packed(engine.batch(state, (rank,)))

    def steps(count: int) -> None:
      # The same step again: nobody looks at the tokens.
      for _ in range(count):
        store.commit(rank, store.step(rank, 0, ints, _nothing))

    return steps

  return [stepping(rank) for (rank,) in engine.backend.domains()]


def interleaved(
  ways: Mapping[str, Callable[[int], Any]], pairs: int, steps: int
) -> dict[str, list[float]]:
  """Seconds a step of each way's blocks, which take turns."""
  found: dict[str, list[float]] = {way: [] for way in ways}
  for pair in range(-1, pairs):
    for way in list(ways)[:: 1 if pair % 2 else -1]:
      start = time.perf_counter()
      ways[way](steps)
      if pair >= 0:  # the first one warms up
        found[way].append((time.perf_counter() - start) / steps)
  return found


def row(found: Mapping[str, list[float]]) -> dict[str, Cell]:
  """Medians, and the whole batch's time over the others'."""
  cells: dict[str, Cell] = {
    f"{way} ms": 1e3 * stat(seconds).median for way, seconds in found.items()
  }
  for way in (PINGPONG, IN_TURN):
    ratio = stat(paired(found[WHOLE], found[way]))
    cells |= {
      f"whole / {way}": ratio.median, f"{way}: low": ratio.low,
      f"{way}: high": ratio.high,
    }  # fmt: skip
  return cells


def _nothing(place: str, rank: int, layer: int) -> None:
  del place, rank, layer
