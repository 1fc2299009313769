"""Which policy for a fleet: weeks of faults, from 64 to 10,240 devices.

  python -m experiments.fleet --config=configs/fleet.py --workdir=DIR \
      --config.instances=1,16,160 --config.seeds=0,1,2 --config.rate=llama3 \
      --config.policy_kwargs.kv_restore.checkpoint=host

The keys of a config are those of `fleet_settings.Settings`. DIR then holds, for
each policy, number of devices and seed, POLICY/devicesN/seedS/ with
`sample.json` (its numbers) and `events.jsonl` (a line for each recovery); over
all of them `samples.jsonl`, `table.md`, `.csv`, `.tex`, `stall_scale.png` and
`redundancy_availability.png`, both also as PDF. A finished cell is skipped when
asked again.

Exit status: 0; 2 for bad input (one line on stderr); 130 when interrupted.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments import fleet_cells, fleet_figures, fleet_settings, fleet_table
from experiments import run as launcher
from experiments.fleet_cells import Cell
from experiments.fleet_settings import Settings
from experiments.progress import seconds
from experiments.provenance import provenance
from resilient_moe.report.runs import write_text


def launch(argv: Sequence[str]) -> int:
  """Runs what a command line asks for; the exit status."""
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  try:
    asked = launcher.parse(argv)
    settings = fleet_settings.read(asked.config)
    todo = _todo(asked.workdir, settings)
    _check_policies(settings)
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return launcher.BAD_INPUT
  asked.workdir.mkdir(parents=True, exist_ok=True)
  _write(asked.workdir / "config.json", dataclasses.asdict(settings))
  origin = provenance("experiments.fleet", argv, "simulated", settings.ranks)
  if todo or not (asked.workdir / "provenance.json").is_file():
    _write(asked.workdir / "provenance.json", origin)
  try:
    run_all(asked.workdir, settings, todo)
  except KeyboardInterrupt:
    print(
      "\ninterrupted; the same command goes on from here", file=sys.stderr
    )
    return launcher.INTERRUPTED
  conclude(asked.workdir)
  return 0


def _write(path: pathlib.Path, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2) + "\n")


def _todo(workdir: pathlib.Path, settings: Settings) -> list[Cell]:
  return [
    cell
    for cell in fleet_cells.cells(settings)
    if not fleet_cells.finished(cell.folder(workdir, settings), settings, cell)
  ]


def _check_policies(settings: Settings) -> None:
  """Every policy can be made, and prepared at this scale."""
  costs = fleet_cells.costs_of(settings)
  for label in settings.policies:
    fleet_cells.policy_of(settings, label, costs)


def run_all(
  workdir: pathlib.Path, settings: Settings, todo: Sequence[Cell]
) -> None:
  """Runs cells, several at a time; says how far it is."""
  jobs = settings.jobs or len(os.sched_getaffinity(0))
  begun, done = time.monotonic(), 0
  all_cells = len(fleet_cells.cells(settings))
  print(f"{len(todo)} of {all_cells} cells to run, {jobs} at a time")
  if jobs == 1 or len(todo) < 2:
    for cell in todo:
      _run_one(workdir, settings, cell)
      done += 1
      _say(cell, settings, done, len(todo), begun)
    return
  # No locks or threads of this process go along.
  context = _context()
  with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
    running = {
      pool.submit(_run_one, workdir, settings, cell): cell for cell in todo
    }
    try:
      for future in concurrent.futures.as_completed(running):
        future.result()
        done += 1
        _say(running[future], settings, done, len(todo), begun)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _context() -> Any:
  import multiprocessing

  return multiprocessing.get_context("spawn")


def _run_one(workdir: pathlib.Path, settings: Settings, cell: Cell) -> None:
  fleet_cells.run_into(cell.folder(workdir, settings), settings, cell)


def _say(
  cell: Cell, settings: Settings, done: int, total: int, begun: float
) -> None:
  spent = time.monotonic() - begun
  left = spent / done * (total - done)
  print(
    f"[{done}/{total}] {cell.label}, {cell.instances * settings.ranks} devices,"
    f" seed {cell.seed}; {seconds(spent)}, about {seconds(left)} left",
    flush=True,
  )


def conclude(workdir: pathlib.Path) -> None:
  """Tables and figures over every sample in a work directory."""
  samples = fleet_table.read_samples(workdir)
  lines = "".join(json.dumps(sample) + "\n" for sample in samples)
  write_text(workdir / "samples.jsonl", lines)
  settings = json.loads((workdir / "config.json").read_text("utf-8"))
  rows = fleet_table.rows(samples, settings.get("cheapest_of", ()))
  text = fleet_table.to_markdown(rows, fleet_table.notes(settings))
  write_text(workdir / "table.md", text)
  write_text(workdir / "table.csv", fleet_table.to_csv(rows))
  write_text(workdir / "table.tex", fleet_table.to_latex(rows))
  figures = fleet_figures.draw(samples, workdir)
  print(f"\n{text}")
  names = ["table.md", "table.csv", "table.tex", "samples.jsonl"]
  print(f"In {workdir}: {', '.join([*names, *(f.name for f in figures)])}")


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
