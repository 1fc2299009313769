"""Runs a campaign: many seeded faults under each policy, in one table.

  python -m experiments.campaign --config=configs/campaign.py --workdir=DIR

The command line and the config are those of `experiments.run`; the fault-free
twin is run once a seed. An interrupted campaign goes on when the same command
is given again. DIR then holds, besides each run's own folder, `campaign.csv`
(a line for each case), `campaign.md` and `campaign.tex` (a row for each
policy).

  --config.only=SCENARIO/POLICY/seedN

runs this one case again, and its twin if need be, and writes no table. The
command that does so in a folder of its own is printed for every case that is
not valid, and stands in `campaign.csv` for all.

Exit status: 0; 1 where a run failed or its history doesn't check; 2 for bad
input (one line on stderr, nothing written); 130 when interrupted.
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments import campaign_table, cases, run, settings, sweep
from experiments.progress import Progress
from experiments.provenance import provenance
from resilient_moe import report
from resilient_moe.report.runs import write_text
from resilient_moe.runtime.gateway import run_case

MODULE = "experiments.campaign"
REPEATS = "repeat"  # folder in the work directory for cases that are repeated


def launch(argv: Sequence[str]) -> int:
  """Runs what a command line asks for; the exit status."""
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  try:
    asked = run.parse(argv)
    chosen = dataclasses.replace(settings.read(asked.config), shared_twin=True)
    jobs = cases.jobs(chosen)
    todo = _todo(asked.workdir, chosen, jobs)
    if todo or not asked.workdir.is_dir():
      origin = provenance(MODULE, argv, chosen.runtime, chosen.ranks)
      sweep.start(asked.workdir, chosen, origin)
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return run.BAD_INPUT
  print(_announcement(chosen, jobs, todo))
  try:
    _run_all(asked.workdir, todo)
  except KeyboardInterrupt:
    print("\ninterrupted; the same command goes on from here", file=sys.stderr)
    return run.INTERRUPTED
  return _conclude(asked.workdir, chosen, jobs, argv)


def repeat_command(
  argv: Sequence[str], workdir: pathlib.Path, place: pathlib.PurePath
) -> str:
  """What runs a single case again, beside the campaign that it is part of."""
  kept: list[str] = []
  rest = iter(argv[1:])
  for arg in rest:
    name, equals, _ = arg.lstrip("-").partition("=")
    if name not in ("workdir", "config.only"):
      kept.append(arg)
    elif not equals:
      next(rest, None)  # its value stands alone
  kept += [f"--workdir={workdir / REPEATS}", f"--config.only={place}"]
  return shlex.join(["python", "-m", MODULE, *kept])


def _todo(
  workdir: pathlib.Path,
  chosen: settings.Settings,
  jobs: Sequence[cases.Job],
) -> list[cases.Job]:
  """What is not finished; the only case is run again, finished or not."""
  open_places = {job.place for job in sweep.pending(workdir, chosen, jobs)}
  return [
    job
    for job in jobs
    if job.place in open_places or str(job.place) == chosen.only
  ]


def _announcement(
  chosen: settings.Settings,
  jobs: Sequence[cases.Job],
  todo: Sequence[cases.Job],
) -> str:
  """What is to be run, and how many processes it plans to kill."""
  judged = _judged(jobs)
  planned = sum(campaign_table.planned_kills(job.case.faults) for job in judged)
  seeds = {job.case.seed for job in jobs}
  return (
    f"campaign: {len(judged)} cases and {len(jobs) - len(judged)} fault-free"
    f" runs over {len(seeds)} seeds, {planned} kills planned,"
    f" runtime {chosen.runtime}, {chosen.ranks} ranks;"
    f" {len(jobs) - len(todo)} done before"
  )


def _judged(jobs: Sequence[cases.Job]) -> list[cases.Job]:
  """The cases of the table: all but the twins."""
  return [job for job in jobs if job.case.policy != cases.TWIN]


def _run_all(workdir: pathlib.Path, todo: Sequence[cases.Job]) -> None:
  """Runs the jobs that are to do, one after another."""
  pace = Pace()
  for number, job in enumerate(todo):
    case = job.case
    title = (
      f"[{number + 1}/{len(todo)}{pace.left(todo[number:])}]"
      f" {case.policy}, {case.scenario}, seed {case.seed}"
    )
    progress = Progress(title)
    start_s = pace.clock()
    progress.close(sweep.run(job, workdir, run_case, progress))
    pace.took(case.policy, pace.clock() - start_s)


class Pace:
  """How long runs took, by policy: a restart takes longer than the others."""

  def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
    self.clock = clock
    self._took_s: dict[str, list[float]] = {}

  def took(self, policy: str, seconds: float) -> None:
    """Notes the duration of a run."""
    self._took_s.setdefault(policy, []).append(seconds)

  def left(self, jobs: Sequence[cases.Job]) -> str:
    """The time that these jobs may take, in words; empty if nobody knows."""
    every = [s for each in self._took_s.values() for s in each]
    if not every:
      return ""
    total_s = 0.0
    for job in jobs:
      known = self._took_s.get(job.case.policy, every)
      total_s += sum(known) / len(known)
    if total_s < 90:
      return f", {total_s:.0f} s left"
    if total_s < 5400:
      return f", {total_s / 60:.0f} min left"
    return f", {total_s / 3600:.1f} h left"


def _conclude(
  workdir: pathlib.Path,
  chosen: settings.Settings,
  jobs: Sequence[cases.Job],
  argv: Sequence[str],
) -> int:
  """Writes and prints the tables; the exit status."""
  lines = _lines(workdir, jobs, argv)
  shown = campaign_table.to_markdown(lines, _origin(workdir, chosen, jobs))
  print(f"\n{shown}")
  if not chosen.only:
    write_text(workdir / "campaign.csv", campaign_table.to_csv(lines))
    write_text(workdir / "campaign.md", shown)
    write_text(workdir / "campaign.tex", campaign_table.to_latex(lines))
    print(f"In {workdir}: campaign.md, campaign.csv, campaign.tex;")
  print(f"each run's history.jsonl and verdict.json in {workdir}/")
  print("  SCENARIO/POLICY/seedN/")
  failed = not all(line.valid for line in lines)
  for job in jobs:
    for problem in sweep.complaints(workdir, [job]):
      failed = True
      print(f"error: {problem}", file=sys.stderr)
      command = repeat_command(argv, workdir, job.place)
      print(f"  to repeat: {command}", file=sys.stderr)
  return run.FAILED if failed else 0


def _lines(
  workdir: pathlib.Path, jobs: Sequence[cases.Job], argv: Sequence[str]
) -> list[campaign_table.Line]:
  """Every case, measured from its history and that of its twin."""
  of_twin = functools.cache(_of_twin)
  lines = []
  for job in _judged(jobs):
    folder = workdir / job.place
    twin = of_twin(sweep.twin_folder(workdir, job.twin_place))
    events, verdict = sweep.events_of(folder) or [], sweep.verdict_of(folder)
    command = repeat_command(argv, workdir, job.place)
    try:
      line = campaign_table.line_of(job.case, events, twin, verdict, command)
    except (LookupError, TypeError, ValueError) as error:
      # One odd history must not cost the table of a long campaign.
      print(f"error: {job.place} can't be measured: {error}", file=sys.stderr)
      unknown = {"overall": "unknown", "error": str(error)}
      line = campaign_table.line_of(job.case, [], twin, unknown, command)
    lines.append(line)
  return lines


def _of_twin(folder: pathlib.Path) -> list[report.Event] | None:
  """The history of a twin; one that failed proves nothing."""
  if sweep.error_of(folder) is not None:
    return None
  return sweep.events_of(folder)


def _origin(
  workdir: pathlib.Path,
  chosen: settings.Settings,
  jobs: Sequence[cases.Job],
) -> list[str]:
  """What the numbers were measured on, in sentences; all starts count."""
  found = json.loads((workdir / "provenance.json").read_text("utf-8"))
  starts: list[dict[str, Any]] = [*found.get("earlier", []), found]
  commits = dict.fromkeys(
    f"{start['commit']}{' (changed)' if start['dirty'] else ''}"
    for start in starts
  )
  places = dict.fromkeys(
    f"{start['device_kind']}; {start['processor']}, {start['cores']} cores,"
    f" {start['platform']}"
    for start in starts
  )
  planned = sum(campaign_table.planned_kills(job.case.faults) for job in jobs)
  return [
    f"Runtime {chosen.runtime}, {chosen.ranks} ranks, {planned} kills planned.",
    f"Measured on {'; and on '.join(places)}.",
    f"Commit {', '.join(commits)}; jax {found['versions']['jax']};"
    f" {starts[0]['date']} to {found['date']} (starts: {len(starts)}).",
  ]


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
