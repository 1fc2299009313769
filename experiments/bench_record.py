"""What a benchmark leaves: samples, statistics derived from them, targets.

Samples are kept as they were measured, in seconds unless named otherwise;
medians and intervals are derived when they are shown.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resilient_moe.report.runs import write_text

Cell = str | int | float | bool | None
BOOTSTRAP = 2000  # resamples of an interval


@dataclasses.dataclass(frozen=True)
class Target:
  """Something to reach; `measured` None: this run can't say."""

  what: str
  measured: float | None
  limit: float
  unit: str = ""
  at_most: bool = True

  @property
  def met(self) -> bool | None:
    """Whether it is reached."""
    if self.measured is None:
      return None
    if self.at_most:
      return self.measured <= self.limit
    return self.measured >= self.limit


@dataclasses.dataclass(frozen=True)
class Result:
  """One benchmark's outcome."""

  name: str
  rows: Sequence[Mapping[str, Cell]]
  samples: Mapping[str, Sequence[float]]
  targets: Sequence[Target] = ()
  notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Stat:
  """A median with its 95% bootstrap interval."""

  median: float
  low: float
  high: float
  n: int


def stat(samples: Sequence[float]) -> Stat:
  """Median and interval; the resampling is seeded."""
  values = np.asarray(samples, float)
  if not len(values):
    raise ValueError("no samples: needed is at least 1")
  rng = np.random.default_rng(0)
  picks = rng.integers(0, len(values), (BOOTSTRAP, len(values)))
  medians = np.median(values[picks], axis=1)
  low, high = np.percentile(medians, (2.5, 97.5))
  return Stat(float(np.median(values)), float(low), float(high), len(values))


def paired(on: Sequence[float], off: Sequence[float]) -> list[float]:
  """The ratio of each pair of neighbouring blocks."""
  return [a / b for a, b in zip(on, off, strict=True)]


def between(found: Stat, digits: int = 3) -> str:
  """`median [low, high]`."""
  return (
    f"{found.median:.{digits}f} [{found.low:.{digits}f}, "
    f"{found.high:.{digits}f}]"
  )


def show(value: Cell) -> str:
  """A cell for people."""
  if value is None:
    return "-"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
  return f"{value:,}" if isinstance(value, int) else value


def table(rows: Sequence[Mapping[str, Cell]]) -> str:
  """A Markdown table; columns in the order in which they first appear."""
  if not rows:
    return "(nothing)"
  names = list(dict.fromkeys(name for row in rows for name in row))
  body = [[show(row.get(name)) for name in names] for row in rows]
  widths = [
    max(len(line[i]) for line in [names, *body]) for i in range(len(names))
  ]
  lines = []
  for line in [names, ["-" * width for width in widths], *body]:
    cells = [c.ljust(w) for c, w in zip(line, widths, strict=True)]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def target_rows(results: Sequence[Result]) -> list[dict[str, Cell]]:
  """One row for each target."""
  words = {True: "yes", False: "NO", None: "not measured"}
  return [
    {
      "benchmark": result.name,
      "target": target.what,
      "measured": target.measured,
      "limit": f"{'<=' if target.at_most else '>='} {show(target.limit)}",
      "unit": target.unit,
      "met": words[target.met],
    }
    for result in results
    for target in result.targets
  ]


def text(result: Result) -> str:
  """What a benchmark prints."""
  parts = [f"## {result.name}", "", table(result.rows)]
  parts += [""] + [f"- {note}" for note in result.notes]
  return "\n".join(parts).rstrip() + "\n"


def write(
  result: Result, workdir: pathlib.Path, origin: Mapping[str, Any]
) -> None:
  """Writes DIR/<name>.json: everything, with where it comes from."""
  targets = [
    {**dataclasses.asdict(target), "met": target.met}
    for target in result.targets
  ]
  stats = {
    name: dataclasses.asdict(stat(values))
    for name, values in result.samples.items()
    if len(values)
  }
  record = {
    "name": result.name,
    "targets": targets,
    "rows": [dict(row) for row in result.rows],
    "notes": list(result.notes),
    "statistics": stats,
    "samples": {name: list(v) for name, v in result.samples.items()},
    "provenance": dict(origin),
  }
  write_text(workdir / f"{result.name}.json", json.dumps(record, indent=1))
