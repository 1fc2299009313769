"""Where the host's time of a decode step goes."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from experiments import bench_engine, bench_models
from experiments.bench_record import Cell, Result, stat
from resilient_moe.runtime import device_store, emulated

TOTAL, REST = "total", "rest"


class Stopwatch:
  """Seconds by label, summed within a step."""

  def __init__(self) -> None:
    self.spent: dict[str, float] = {}

  def timed(self, label: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, its seconds added to the label's."""

    def call(*args: Any, **kwargs: Any) -> Any:
      start = time.perf_counter()
      try:
        return fn(*args, **kwargs)
      finally:
        seconds = time.perf_counter() - start
        self.spent[label] = self.spent.get(label, 0.0) + seconds

    return call

  @contextlib.contextmanager
  def watching(self, *what: tuple[Any, str, str]) -> Iterator[None]:
    """Times (owner, attribute, label); none of them may call another."""
    with contextlib.ExitStack() as stack:
      for owner, name, label in what:
        timed = self.timed(label, getattr(owner, name))
        stack.enter_context(mock.patch.object(owner, name, timed))
      yield


def run(
  settings: bench_models.Settings, workdir: pathlib.Path
) -> Result:
  """Takes the decode steps of each model apart."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  for name, model in settings.models.items():
    engine = bench_engine.shared(name, model, settings, workdir)
    count = settings.pairs * settings.block_steps
    steps = _watched(engine, count, settings.block_steps)
    labels = dict.fromkeys(label for step in steps for label in step)
    found = {x: [step.get(x, 0.0) for step in steps] for x in labels}
    samples |= {f"{name}/{label}": s for label, s in found.items()}
    total = stat(found[TOTAL]).median
    for label, seconds in found.items():
      s = stat(seconds)
      rows.append({
        "model": name, "part": label, "us": 1e6 * s.median,
        "low": 1e6 * s.low, "high": 1e6 * s.high,
        "% of the step": 100 * s.median / total,
      })  # fmt: skip
  note = (
    "wait: the devices compute; everything else is the host's; rest: Python "
    "between the parts"
  )
  return Result("steps", rows, samples, (), (note,))


def _watched(
  engine: bench_engine.Engine, count: int, block: int
) -> list[dict[str, float]]:
  """Seconds by part of each step."""
  watch, backend = Stopwatch(), engine.backend
  what = [
    (bench_engine, "schedule", "schedule"),
    (emulated, "packed", "pack"),
    (backend.seats, "note", "place"),
    (device_store, "_assemble", "views"),
    (jax, "device_put", "put"),
    (jax, "block_until_ready", "wait"),
    (backend.store, "commit", "commit"),
    (backend.checkpointer, "stream", "stream"),
    (bench_engine, "complete", "complete"),
  ]
  find = backend.store.program

  def program(*args: Any) -> tuple[Any, Any]:
    compiled, source = find(*args)
    return watch.timed("dispatch", compiled), source

  found: list[dict[str, float]] = []
  start = engine.decoding()
  with (
    watch.watching(*what),
    mock.patch.object(backend.store, "program", program),
  ):
    while len(found) < count:
      state = start
      for _ in range(block):
        watch.spent = {}
        seconds, state = engine.step(state, backend.poll)
        parts = dict(watch.spent)
        parts["history"] = _history_s(engine, state)
        rest = seconds - sum(watch.spent.values())
        total = seconds + parts["history"]
        found.append({TOTAL: total, **parts, REST: rest})
  return found


def _history_s(engine: bench_engine.Engine, state: Any) -> float:
  """Seconds of writing a step's event with a token of every request."""
  emitted = [[n, s.known, 1] for n, s in state.sequences.items()]
  start = time.perf_counter()
  engine.recorder.write(
    "step", step=engine.number, epoch=0, bucket=0, seconds=0.0,
    prefill_tokens=0, emitted=emitted,
  )  # fmt: skip
  return time.perf_counter() - start
