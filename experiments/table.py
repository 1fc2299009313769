"""Rebuilds the tables of a work directory from its stored histories.

  python -m experiments.table --workdir=DIR

Writes table.csv, table.md and table.tex, and prints the readable one. With
`--recheck` the checkers read every history anew first (verdict.json).
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cases, sweep
from resilient_moe import report


def parse_workdir(
  argv: Sequence[str], help_text: str | None, *switches: str
) -> tuple[pathlib.Path, set[str]]:
  """`--workdir` of a finished comparison, and which switches are on.

  Raises:
    ValueError: with the reason in one line.
  """
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir", None, "A folder that experiments.run filled.", flag_values=values
  )
  for name in switches:
    flags.DEFINE_bool(name, False, "See above.", flag_values=values)
  if {"-h", "--help"} & set(argv):
    print(f"{help_text}\n{values.get_help()}")
    sys.exit()
  try:
    rest = values(list(argv))[1:]
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if rest or not values.workdir:
    raise ValueError("needed is --workdir=DIR and nothing else")
  workdir = pathlib.Path(values.workdir)
  if not any(workdir.glob("*/*/seed*")):
    raise ValueError(
      f"--workdir={workdir} holds no runs; expected are"
      " SCENARIO/POLICY/seedN/ as experiments.run leaves them"
    )
  return workdir, {name for name in switches if values[name].value}


def recheck(workdir: pathlib.Path) -> None:
  """Judges every history anew; a run's failure stays one."""
  for folder in sorted(workdir.glob("*/*/seed*")):
    if (folder / "history.jsonl").is_file():
      place = folder.relative_to(workdir)
      twin = place.parent.parent / cases.TWIN / place.name
      sweep.judge(workdir, place, twin, sweep.error_of(folder))


def _slo(workdir: pathlib.Path) -> dict[str, float]:
  """The objectives of the config that was run."""
  file = workdir / "config.json"
  slo = json.loads(file.read_text("utf-8")).get("slo") if file.is_file() else {}
  return dict(slo or {})


def launch(argv: Sequence[str]) -> int:
  """Does what a command line asks for; the exit status."""
  try:
    workdir, on = parse_workdir(argv, __doc__, "recheck")
    if "recheck" in on:
      recheck(workdir)
    rows = report.write_tables(workdir, **_slo(workdir))
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print(report.to_markdown(rows))
  print(f"In {workdir}: table.md, table.csv, table.tex")
  return 0


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
