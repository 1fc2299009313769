"""Decode throughput with attention and experts apart, against together.

Both on the emulated runtime in this process, with the same model, as many
devices, as many rows in all, every row busy, no policy, no faults.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jax

from experiments import bench_engine
from experiments import bench_models as models
from experiments import bench_split as split
from experiments.bench_record import Cell, Result, Target, paired, stat
from resilient_moe.datapath import exchange, grouping
from resilient_moe.runtime.split.attention import AttentionRank
from resilient_moe.runtime.split.experts import ExpertRank

LEAST = 0.7
APART, TOGETHER = "apart", "together"
TOTAL, REST = "total", "rest"


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Interleaved blocks, then a step of each taken apart; for each model."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets = []
  for name, model in settings.apart().items():
    with both(name, model, settings, workdir) as engines:
      found = blocks(engines, settings.pairs, settings.block_steps)
      ratio = stat(paired(found[APART], found[TOGETHER]))
      for key, engine in engines.items():
        parts, calls = taken_apart(
          engine, settings.pairs, settings.block_steps
        )
        rate = stat(found[key]).median
        rows += part_rows(name, key, parts, calls, rate)
        found |= {f"{key}/{k}": v for k, v in parts.items()}
    samples |= {f"{name}/{k}": v for k, v in found.items()}
    targets.append(Target(
      f"{name}: decode throughput apart against together, emulated",
      ratio.median, LEAST, f"times [{ratio.low:.2f}, {ratio.high:.2f}]",
      at_most=False,
    ))  # fmt: skip
  return Result("split_throughput", rows, samples, targets, notes(settings))


def notes(settings: models.Settings) -> tuple[str, ...]:
  """What is equal, and what the parts mean."""
  n, aws = settings.split.ranks, settings.split.attention
  return (
    f"equal: model, {n} virtual devices, rows in all, no policy; together: "
    f"{n} ranks; apart: {aws} attention and {n - aws} expert ranks; tokens/s: "
    f"median of blocks of {settings.block_steps} steps of everybody",
    "parts: us of a round (each attention rank, or the mesh, steps once) in "
    "blocks of their own, in which each program is waited for where it is "
    "called; time within a part that is listed counts there only",
  )


@contextlib.contextmanager
def both(
  name: str, model: models.Model, settings: models.Settings,
  workdir: pathlib.Path,
) -> Iterator[dict[str, split.Driven]]:  # fmt: skip
  """An engine of each deployment."""
  n, aws = settings.split.ranks, settings.split.attention
  total = split.same_rows(settings, model)
  with contextlib.ExitStack() as stack:
    engines = {}
    for key, attention in ((APART, aws), (TOGETHER, 0)):
      engines[key] = split.open_engine(
        name, model, settings, workdir, attention=attention, ranks=n,
        rows=total // (attention or n),
      )  # fmt: skip
      stack.callback(engines[key].close)
      split.say(f"{name}, {key}: ready")
    yield engines


def blocks(
  engines: Mapping[str, split.Driven], pairs: int, steps: int
) -> dict[str, list[float]]:
  """Tokens/s of each engine's blocks; they take turns at being first."""
  states = {key: engine.decoding() for key, engine in engines.items()}
  found: dict[str, list[float]] = {key: [] for key in engines}
  for pair in range(-1, pairs):
    order = list(engines)[:: 1 if pair % 2 else -1]
    for key in order:
      seconds, tokens = engines[key].block(states[key], steps)
      if pair >= 0:  # the first one warms up
        found[key].append(tokens / seconds)
  return found


def taken_apart(
  engine: split.Driven, pairs: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
  """A round by part: seconds, a sample for each block, and calls."""
  watch, state = split.Inner(), engine.decoding()
  found: list[dict[str, float]] = []
  store = engine.backend.store
  watching = _watch_apart if engine.plans.view.disaggregated else _watch_mesh
  with watching(watch, store), watch.watching(
    (bench_engine, "schedule", "scheduler"), (split, "complete", "scheduler"),
    (jax, "device_put", "transfers to devices"),
  ):  # fmt: skip
    for _ in range(pairs):
      watch.spent = {}
      seconds, _ = engine.block(state, steps)
      rest = seconds - sum(watch.spent.values())
      spent = {TOTAL: seconds, **watch.spent, REST: rest}
      found.append({part: s / steps for part, s in spent.items()})
  labels = dict.fromkeys(label for parts in found for label in parts)
  calls = {k: n / pairs / steps for k, n in watch.calls.items()}
  return {k: [parts.get(k, 0.0) for parts in found] for k in labels}, calls


@contextlib.contextmanager
def _watch_apart(watch: split.Inner, store: Any) -> Iterator[None]:
  attending = [r for r in range(len(store.devices)) if store.attends(r)]
  ranks = {"attention": [store._attention[r] for r in attending],
           "experts": list(store._experts.values())}  # fmt: skip
  with contextlib.ExitStack() as stack:
    for kind, some in ranks.items():
      for rank in some:
        programs = {
          name: watch.timed(_label(kind, name), _waited(program))
          for name, program in rank._programs.items()
        }
        stack.enter_context(mock.patch.object(rank, "_programs", programs))
    stack.enter_context(watch.watching(
      (grouping, "group_some", "grouping"), (grouping, "scatter", "scatter"),
      (exchange.Exchange, "run", "exchange, the rest"),
      (ExpertRank, "compute", "experts' padding and reading"),
      (AttentionRank, "step", "attention's step, the rest"),
    ))  # fmt: skip
    yield


def _label(kind: str, program: str) -> str:
  return "commit" if program.startswith("commit") else f"{kind} programs"


def _waited(program: Any) -> Any:
  return lambda *args: jax.block_until_ready(program(*args))


@contextlib.contextmanager
def _watch_mesh(watch: split.Inner, store: Any) -> Iterator[None]:
  find = store.program

  def program(*args: Any) -> tuple[Any, Any]:
    compiled, source = find(*args)
    return watch.timed("the mesh's program", _waited(compiled)), source

  with mock.patch.object(store, "program", program), watch.watching(
    (store, "commit", "commit")
  ):
    yield


def part_rows(
  name: str, key: str, parts: Mapping[str, list[float]],
  calls: Mapping[str, float], rate: float,
) -> list[dict[str, Cell]]:  # fmt: skip
  """A row for each part; throughput stands beside the total."""
  total = stat(parts[TOTAL]).median
  rows: list[dict[str, Cell]] = []
  for part, seconds in parts.items():
    s = stat(seconds)
    rows.append({
      "model": name, "experts": key,
      "tokens/s": rate if part == TOTAL else None, "part": part,
      "calls": calls.get(part), "us a round": 1e6 * s.median,
      "us a call": 1e6 * s.median / calls[part] if part in calls else None,
      "low": 1e6 * s.low,
      "high": 1e6 * s.high, "%": 100 * s.median / total,
    })  # fmt: skip
  return rows
