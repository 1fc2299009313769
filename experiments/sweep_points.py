"""A sweep: config values x seeds x policies, several runs at a time.

  python -m experiments.sweep --config=configs/quickstart.py --workdir=DIR \
      --sweep.ranks=4,8 --sweep.policies=mesh_shrink,kv_restore \
      --sweep.seeds=0,1,2 --config.runtime=simulated

`--sweep.KEY=VALUE,VALUE` takes every value of a config key; the product of all
of them is swept. A point, which is one choice of the values other than
policies, scenarios, seeds and instances, is a comparison of its own in
DIR/KEY=VALUE.../, as `experiments.run` (or, for a config of the fleet study,
`experiments.fleet`) leaves it; `DIR/table.csv` and `.md` are over all points.

Simulated runs go several at a time (`--jobs=N`; by default as many as cores),
real ones one after the other unless told. A finished run is skipped when asked
again. Exit status as `experiments.run`.
"""

import csv
import io
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

from experiments import fleet_points, run_points
from experiments.run import BAD_INPUT, FAILED, INTERRUPTED, parse
from experiments.tasks import run_tasks
from resilient_moe.report.runs import write_text
from resilient_moe.report.table import grid, short

# Keys whose values are rows of one comparison, not points of their own.
ROWS = ("instances", "policies", "scenarios", "seeds")
_SWEEP = "--sweep."
_SHOWN = (
  "policy", "scenario", "devices", "seeds", "verdict", "affected_stall_s",
  "service_stall_s", "affected_speedup_vs_restart", "tokens_recomputed",
  "full", "goodput_fraction", "stall_p50_s", "stall_p99_s",
  "redundancy_memory",
)  # fmt: skip


class Point(NamedTuple):
  """One comparison of a sweep."""

  values: dict[str, str]  # the swept keys
  workdir: pathlib.Path
  config: ml_collections.ConfigDict


class Asked(NamedTuple):
  """The command line, parsed."""

  points: list[Point]
  workdir: pathlib.Path
  jobs: int  # 0: not said


def read(argv: Sequence[str]) -> Asked:
  """The points of a command line.

  Raises:
    ValueError: with the reason in one line.
  """
  rest: list[str] = []
  axes: dict[str, list[str]] = {}
  jobs = 0
  for arg in argv:
    key, equals, text = arg.partition("=")
    if key == "--jobs":
      if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{arg}: needed is --jobs=N with N from 1")
      jobs = int(text)
    elif key.startswith(_SWEEP):
      listed = [value.strip() for value in text.split(",")]
      if not equals or "" in listed or len(set(listed)) < len(listed):
        raise ValueError(
          f"{arg}: needed is {_SWEEP}KEY=VALUE,VALUE with no value twice"
        )
      axes[key.removeprefix(_SWEEP)] = listed
    else:
      rest.append(arg)
  if not axes:
    raise ValueError(f"nothing is swept; give {_SWEEP}KEY=VALUE,VALUE")
  rows = [
    f"--config.{key}={','.join(axes[key])}" for key in axes if key in ROWS
  ]
  keys = [key for key in axes if key not in ROWS]
  workdir = parse([*rest, *rows]).workdir
  points = []
  for chosen in itertools.product(*(axes[key] for key in keys)):
    values = dict(zip(keys, chosen, strict=True))
    given = [f"--config.{key}={value}" for key, value in values.items()]
    name = "_".join(f"{k}={v}" for k, v in values.items()) or "all"
    asked = parse([*rest, *rows, *given])
    folder = workdir / name.replace("/", "-")
    points.append(Point(values, folder, asked.config))
  return Asked(points, workdir, jobs)


def launch(argv: Sequence[str]) -> int:
  """Runs what a command line asks for; the exit status."""
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  try:
    asked = read(argv)
    kinds = [kind_of(point.config) for point in asked.points]
    tasks = [
      task
      for kind, point in zip(kinds, asked.points, strict=True)
      for task in kind.tasks(point.workdir, point.config, argv)
    ]
    simulated = all(
      kind.simulated(point.config)
      for kind, point in zip(kinds, asked.points, strict=True)
    )
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  cores = len(os.sched_getaffinity(0))
  jobs = asked.jobs or (cores if simulated else 1)
  try:
    run_tasks(tasks, jobs)
  except KeyboardInterrupt:
    print(
      "\ninterrupted; the same command goes on from here", file=sys.stderr
    )
    return INTERRUPTED
  problems = []
  for kind, point in zip(kinds, asked.points, strict=True):
    problems += kind.conclude(point.workdir, point.config)
  print(f"\n{write_tables(asked.workdir, asked.points)}")
  print(f"In {asked.workdir}: table.md, table.csv; a folder for each point")
  for problem in problems:
    print(f"error: {problem}", file=sys.stderr)
  return FAILED if problems else 0


def kind_of(
  config: ml_collections.ConfigDict,
) -> type[run_points.Runs] | type[fleet_points.Fleets]:
  """Whose config it is: a comparison names a checkpoint."""
  return run_points.Runs if "checkpoint" in config else fleet_points.Fleets


def write_tables(workdir: pathlib.Path, points: Sequence[Point]) -> str:
  """One table over all points, of theirs; the readable one is returned."""
  found: list[dict[str, str]] = []
  for point in points:
    text = (point.workdir / "table.csv").read_text("utf-8")
    for row in csv.DictReader(io.StringIO(text)):
      found.append({**point.values, **row})
  keys = list(points[0].values)
  columns = list(dict.fromkeys(name for row in found for name in row))
  out = io.StringIO()
  writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
  writer.writeheader()
  writer.writerows(found)
  write_text(workdir / "table.csv", out.getvalue())
  shown = [*keys, *(c for c in _SHOWN if c in columns and c not in keys)]
  body = [[_cell(row, name) for name in shown] for row in found]
  text = f"### Sweep\n\n{grid(shown, body)}"
  write_text(workdir / "table.md", text)
  points_said = [
    {"values": p.values, "folder": p.workdir.name} for p in points
  ]
  write_text(
    workdir / "points.json", json.dumps(points_said, indent=2) + "\n"
  )
  return text


def _cell(row: dict[str, str], name: str) -> str:
  """A cell of the readable table: a median, and its interval if it has one."""
  text = row.get(name, "")
  low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
  if not text or not low or not high:
    return text or "-"
  try:
    shown = [short(float(each)) for each in (text, low, high)]
  except ValueError:  # `invalid`
    return text
  middle, least, most = shown
  return middle if least == most else f"{middle} [{least}, {most}]"
