"""Runs a campaign: many seeded faults under each policy, in one table.

  python -m experiments.campaign --config=configs/campaign.py --workdir=DIR

The command line and the config are those of `experiments.run`; the fault-free
twin is run once a seed. A config may have parts, over several deployments say
(`parts.py`). An interrupted campaign goes on when the same command is given
again. DIR then holds, besides each run's own folder, `campaign.csv` (a line for
each case), `campaign.md` and `campaign.tex` (a row for each policy).

  --config.only=SCENARIO/POLICY/seedN

runs this one case again, and its twin if need be, and writes no table; of a
config with parts, PART/SCENARIO/POLICY/seedN. The command that does so in a
folder of its own is printed for every case that is not valid, and stands in
`campaign.csv` for all.

Exit status: 0; 1 where a run failed or its history doesn't check; 2 for bad
input (one line on stderr, nothing written); 130 when interrupted.
"""

import functools
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments import campaign_table, cases, parts, run, sweep
from experiments.parts import REPEATS, Part
from experiments.progress import Progress
from experiments.provenance import provenance
from resilient_moe import report
from resilient_moe.report.runs import write_text
from resilient_moe.runtime.gateway import run_case

MODULE = "experiments.campaign"


def launch(argv: Sequence[str]) -> int:
  """Runs what a command line asks for; the exit status."""
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  try:
    asked = run.parse(argv)
    found = parts.read(asked.config, asked.workdir)
    for part in found:
      if part.todo or not part.workdir.is_dir():
        chosen = part.chosen
        origin = provenance(MODULE, argv, chosen.runtime, chosen.ranks)
        sweep.start(part.workdir, chosen, origin)
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return run.BAD_INPUT
  print(_announcement(found))
  try:
    _run_all(found)
  except KeyboardInterrupt:
    print("\ninterrupted; the same command goes on from here", file=sys.stderr)
    return run.INTERRUPTED
  return _conclude(asked.workdir, found, argv)


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


def _announcement(found: Sequence[Part]) -> str:
  """What is to be run, and how many processes it plans to kill."""
  jobs = [job for part in found for job in part.jobs]
  judged = _judged(jobs)
  seeds = {job.case.seed for job in jobs}
  done = len(jobs) - sum(len(part.todo) for part in found)
  return (
    f"campaign: {len(judged)} cases and {len(jobs) - len(judged)} fault-free"
    f" runs over {len(seeds)} seeds, {_planned(jobs)} kills planned,"
    f" {'; '.join(dict.fromkeys(map(_where, found)))}; {done} done before"
  )


def _where(part: Part) -> str:
  """What serves."""
  chosen = part.chosen
  text = f"runtime {chosen.runtime}, {chosen.ranks} ranks"
  # All cases of a part have the same.
  attention = part.jobs[0].case.attention
  return f"{text}, {attention} of them attention" if attention else text


def _planned(jobs: Iterable[cases.Job]) -> int:
  """Kills."""
  return sum(campaign_table.planned_kills(job.case.faults) for job in jobs)


def _judged(jobs: Iterable[cases.Job]) -> list[cases.Job]:
  """The cases of the table: all but the twins."""
  return [job for job in jobs if job.case.policy != cases.TWIN]


def _run_all(found: Sequence[Part]) -> None:
  """Runs the jobs that are to do, one after another."""
  pace = Pace()
  todo = [(part, job) for part in found for job in part.todo]
  for number, (part, job) in enumerate(todo):
    case = job.case
    left = pace.left([job for _, job in todo[number:]])
    names = [part.name] if part.name else []
    names += [case.policy, case.scenario, f"seed {case.seed}"]
    progress = Progress(f"[{number + 1}/{len(todo)}{left}] {', '.join(names)}")
    start_s = pace.clock()
    progress.close(sweep.run(job, part.workdir, run_case, progress))
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
  workdir: pathlib.Path, found: Sequence[Part], argv: Sequence[str]
) -> int:
  """Writes and prints the tables; the exit status."""

  def again(part: Part, job: cases.Job) -> str:
    return repeat_command(argv, workdir, part.place(job))

  lines = [line for part in found for line in _lines(part, again)]
  shown = campaign_table.to_markdown(lines, _origin(found))
  print(f"\n{shown}")
  if not found[0].chosen.only:
    write_text(workdir / "campaign.csv", campaign_table.to_csv(lines))
    write_text(workdir / "campaign.md", shown)
    write_text(workdir / "campaign.tex", campaign_table.to_latex(lines))
    print(f"In {workdir}: campaign.md, campaign.csv, campaign.tex;")
  print(f"each run's history.jsonl and verdict.json in {workdir}/")
  print(f"  {'PART/' if found[0].name else ''}SCENARIO/POLICY/seedN/")
  failed = not all(line.valid for line in lines)
  for part, job in [(each, job) for each in found for job in each.jobs]:
    for problem in sweep.complaints(part.workdir, [job]):
      failed = True
      name = f"{part.name}/" if part.name else ""
      print(f"error: {name}{problem}", file=sys.stderr)
      print(f"  to repeat: {again(part, job)}", file=sys.stderr)
  return run.FAILED if failed else 0


def _lines(
  part: Part, again: Callable[[Part, cases.Job], str]
) -> list[campaign_table.Line]:
  """Every case, measured from its history and that of its twin."""
  of_twin = functools.cache(_of_twin)
  lines = []
  for job in _judged(part.jobs):
    folder = part.workdir / job.place
    twin = of_twin(sweep.twin_folder(part.workdir, job.twin_place))
    events, verdict = sweep.events_of(folder) or [], sweep.verdict_of(folder)
    command = again(part, job)
    try:
      line = campaign_table.line_of(job.case, events, twin, verdict, command)
    except (LookupError, TypeError, ValueError) as error:
      # One odd history must not cost the table of a long campaign.
      place = part.place(job)
      print(f"error: {place} can't be measured: {error}", file=sys.stderr)
      unknown = {"overall": "unknown", "error": str(error)}
      line = campaign_table.line_of(job.case, [], twin, unknown, command)
    lines.append(line)
  return lines


def _of_twin(folder: pathlib.Path) -> list[report.Event] | None:
  """The history of a twin; one that failed proves nothing."""
  if sweep.error_of(folder) is not None:
    return None
  return sweep.events_of(folder)


def _origin(found: Sequence[Part]) -> list[str]:
  """What the numbers were measured on, in sentences; all starts count."""
  starts: list[dict[str, Any]] = []
  for part in found:
    file = part.workdir / "provenance.json"
    last = json.loads(file.read_text("utf-8"))
    starts += [*last.get("earlier", []), last]
  starts.sort(key=lambda start: str(start["date"]))
  commits = dict.fromkeys(
    f"{start['commit']}{' (changed)' if start['dirty'] else ''}"
    for start in starts
  )
  places = dict.fromkeys(
    f"{start['device_kind']}; {start['processor']}, {start['cores']} cores,"
    f" {start['platform']}"
    for start in starts
  )
  where = "; ".join(dict.fromkeys(map(_where, found)))
  planned = _planned(job for part in found for job in part.jobs)
  return [
    f"{where[0].upper()}{where[1:]}, {planned} kills planned.",
    f"Measured on {'; and on '.join(places)}.",
    f"Commit {', '.join(commits)}; jax {starts[-1]['versions']['jax']};"
    f" {starts[0]['date']} to {starts[-1]['date']} (starts: {len(starts)}).",
  ]


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
