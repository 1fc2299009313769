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

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments import fleet_cells, fleet_figures, fleet_settings, fleet_table
from experiments import run as launcher
from experiments.fleet_cells import Cell
from experiments.fleet_settings import Settings
from experiments.provenance import provenance
from experiments.tasks import Task, run_tasks
from resilient_moe.report.runs import write_text

FILES = (
  "table.md", "table.csv", "table.tex", "samples.jsonl", "stall_scale.png",
  "redundancy_availability.png",
)  # fmt: skip


def launch(argv: Sequence[str]) -> int:
  """Runs what a command line asks for; the exit status."""
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  try:
    asked = launcher.parse(argv)
    settings = fleet_settings.read(asked.config)
    cells = todo(asked.workdir, settings)
    fleet_cells.check(settings)
    origin = provenance("experiments.fleet", argv, "simulated", settings.ranks)
    if cells or not asked.workdir.is_dir():
      start(asked.workdir, settings, origin)
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return launcher.BAD_INPUT
  try:
    run_all(asked.workdir, settings, cells)
  except KeyboardInterrupt:
    print(
      "\ninterrupted; the same command goes on from here", file=sys.stderr
    )
    return launcher.INTERRUPTED
  print(f"\n{conclude(asked.workdir)}")
  print(f"In {asked.workdir}: {', '.join(FILES)}")
  return 0


def start(
  workdir: pathlib.Path, settings: Settings, origin: dict[str, Any]
) -> None:
  """Makes the work directory; writes `config.json` and `provenance.json`.

  Raises:
    ValueError: it can't be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, value in (
      ("config.json", dataclasses.asdict(settings)),
      ("provenance.json", origin),
    ):
      write_text(workdir / name, json.dumps(value, indent=2) + "\n")
  except OSError as error:
    raise ValueError(
      f"--workdir={workdir} can't be written: {error}"
    ) from error


def todo(workdir: pathlib.Path, settings: Settings) -> list[Cell]:
  """The cells that are not finished; looks, and writes nothing.

  Raises:
    ValueError: one was run with another config.
  """
  return [
    cell
    for cell in fleet_cells.cells(settings)
    if not fleet_cells.finished(cell.folder(workdir, settings), settings, cell)
  ]


def run_all(
  workdir: pathlib.Path, settings: Settings, cells: Sequence[Cell]
) -> None:
  """Runs cells, several at a time; says how far it is."""
  tasks = [
    Task(
      f"{cell.label}, {cell.instances * settings.ranks} devices, "
      f"seed {cell.seed}",
      0,
      fleet_cells.run_cell,
      (workdir, settings, cell),
    )
    for cell in cells
  ]
  run_tasks(tasks, settings.jobs or len(os.sched_getaffinity(0)))


def conclude(workdir: pathlib.Path) -> str:
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
  fleet_figures.draw(samples, workdir)
  return text


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
