"""Fits the simulation's timing to real runs, and says how far off it is.

  python -m experiments.calibrate --runs=runs/quickstart --out=FILE.json \
      [--holdout=2 | --cross=policy] [--machine="2 cores"] [--also=DIR]

RUNS is a work directory of `experiments.run`, on any runtime but the simulated.
Runs whose seed, policy, scenario or place (SCENARIO/POLICY/seedN) is in
--holdout (commas; default: the last seed) are left out of the fit. Then each of
them is simulated with the fitted numbers: same policy, faults and requests.
--cross=seed (or policy, or scenario) holds out one of these after the other,
and fits FILE to all runs.

Printed is how far the simulated stall and resume time are from the real ones,
|simulated - real| / real, the median and p90 over runs, each of them twice:
*in seconds*, which is what counts, and *in steps*, simulated seconds times how
much slower than the calibrated the machine was in that run (its decode steps
before the fault say it; so that uses a number of the run that is held out).
When in a step a fault strikes, and how long it takes until somebody knows, is
chance: a prediction is the median of DRAWS simulations. Beside them stands what
another seed says: the error of predicting a run by the median of the same
scenario and policy under the other seeds, a yardstick for what can be said at
all. Runs whose faults only processes know (a rank that is stuck, a store or
supervisor that is lost) are not simulated: they are fitted, never held out.
--also names runs that are not held out and say only what those of RUNS don't
show, such as how long a replacement takes to start.
The file goes into --config.sim.calibration=FILE.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import flags

from experiments import cases, settings, sweep
from experiments.cases import Job
from experiments.simulated import simulated_case
from resilient_moe import report
from resilient_moe.faults import PROCESS_KINDS
from resilient_moe.report import Event, History
from resilient_moe.report.rows import BASELINE
from resilient_moe.report.runs import write_text
from resilient_moe.sim import fit as fit_lib
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.fitted import Fitted
from resilient_moe.sim.run import Run

METRICS = ("affected_stall_s", "resume_s")
COMPARED = (*METRICS, "step_s")
DRAWS = 5  # of what is a matter of chance
CROSS = ("seed", "policy", "scenario")
BAD_INPUT = 2


class Measured(NamedTuple):
  """A held-out run: its numbers, and the medians of its simulations."""

  job: Job
  real: Mapping[str, Any]
  simulated: Mapping[str, Any]


def jobs_of(workdir: pathlib.Path) -> list[Job]:
  """The finished and valid runs of a work directory, by its config.

  Raises:
    ValueError: there are none.
  """
  file = workdir / "config.json"
  try:
    config = json.loads(file.read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"--runs={workdir}: {error}") from error
  chosen = settings.read(ml_collections.ConfigDict(config))
  if chosen.runtime == "simulated":
    raise ValueError(f"--runs={workdir} holds simulated runs")
  found = [
    job for job in cases.jobs(chosen)
    if sweep.verdict_of(workdir / job.place).get("overall") in report.VALID
  ]  # fmt: skip
  if not found:
    raise ValueError(f"--runs={workdir} holds no valid runs")
  return found


def events_of(workdir: pathlib.Path, job: Job) -> list[Event]:
  """A run's history."""
  return report.read_history(workdir / job.place / "history.jsonl")


def simulate(job: Job, fitted: Fitted, draw: int = 0) -> list[Event]:
  """The same case in virtual time; `draw`: with other chances."""
  clock = VirtualClock()
  history = History(clock.now)
  case = simulated_case(job.case)
  case = dataclasses.replace(case, seed=case.seed + 1000 * draw)
  Run(case, fitted, clock, history).run()
  return list(history)


Place = pathlib.PurePath


class _Of(NamedTuple):
  """A run, and those that it is measured against, if there are any."""

  run: Place
  twin: Place | None
  base: Place | None  # its restart, whose time is the horizon


def _measure(of: _Of, events: Callable[[Place], list[Event]]) -> dict[str, Any]:
  horizon_s = report.recovery_time_s(events(of.base)) if of.base else None
  quiet = events(of.twin) if of.twin else None
  return report.measure(events(of.run), quiet, horizon_s=horizon_s)


def compare(
  workdir: pathlib.Path, found: Sequence[Job], held_out: Sequence[Job],
  fitted: Fitted,
) -> list[Measured]:  # fmt: skip
  """Numbers of each held-out run beside its simulations'.

  Each against its own fault-free twin, over its own restart's horizon; those
  two may be among the fitted runs.
  """
  jobs = {job.place: job for job in found}
  real = functools.cache(lambda place: events_of(workdir, jobs[place]))
  ours = functools.cache(
    lambda place, draw: simulate(jobs[place], fitted, draw)
  )
  measured = []
  for job in held_out:
    if not _comparable(job):
      continue
    twins = (job.twin_place, cases.shared_twin(job))
    base = job.place.parent.parent / BASELINE / job.place.name
    of = _Of(
      job.place,
      next((place for place in twins if place in jobs), None),
      base if base in jobs else None,
    )
    drawn = [
      _measure(of, functools.partial(_drawn, ours, draw))
      for draw in range(DRAWS)
    ]
    middle = {name: _median(d[name] for d in drawn) for name in COMPARED}
    measured.append(Measured(job, _measure(of, real), middle))
  return measured


def _comparable(job: Job) -> bool:
  """Whether there is a fault, and a simulation knows of its kind."""
  kinds = {fault.kind for fault in job.case.faults}
  return bool(kinds) and not kinds & set(PROCESS_KINDS)


def _drawn(
  ours: Callable[[Place, int], list[Event]], draw: int, place: Place
) -> list[Event]:
  return ours(place, draw)


def _median(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return float(np.median(known)) if known else None


def errors(found: Sequence[Measured], name: str, at_speed: bool) -> list[float]:
  """|simulated - real| / real of a metric, over the runs that have it."""
  off = []
  for m in found:
    real, ours = m.real[name], m.simulated[name]
    if not real or ours is None:
      continue
    speed = 1.0
    if at_speed and m.real["step_s"] and m.simulated["step_s"]:
      speed = m.real["step_s"] / m.simulated["step_s"]
    off.append(abs(ours * speed - real) / real)
  return off


def spread(found: Sequence[Measured], name: str) -> list[float]:
  """The error of taking the median of a case's other seeds for a run's."""
  same: dict[tuple[str, str], list[float]] = {}
  for m in found:
    if m.real[name]:
      case = m.job.case
      same.setdefault((case.scenario, case.policy), []).append(m.real[name])
  return [
    abs(float(np.median(values[:i] + values[i + 1 :])) - value) / value
    for values in same.values() if len(values) > 1
    for i, value in enumerate(values)
  ]  # fmt: skip


def summary(found: Sequence[Measured]) -> str:
  """The errors: a line a metric, and the runs themselves."""
  lines = []
  for name in METRICS:
    seconds, steps = (errors(found, name, speed) for speed in (False, True))
    if not seconds:
      continue
    others = spread(found, name)
    line = (
      f"{name}: median error {np.median(seconds):.0%} in seconds (p90"
      f" {np.quantile(seconds, 0.9):.0%}), {np.median(steps):.0%} in steps (p90"
      f" {np.quantile(steps, 0.9):.0%}), over {len(seconds)} held-out runs"
    )
    if others:
      line += f"; another seed says it with {np.median(others):.0%}"
    lines.append(line)
  for m in found:
    parts = [
      f"{name} {m.real[name]:.4g} real, {m.simulated[name]:.4g} simulated"
      for name in COMPARED
      if m.real[name] is not None and m.simulated[name] is not None
    ]
    lines.append(f"  {m.job.place}: {'; '.join(parts) or 'nothing to compare'}")
  return "\n".join(lines)


def calibrate(
  workdir: pathlib.Path, holdout: Sequence[str] | None, machine: str
) -> tuple[Fitted, list[Measured]]:
  """Fits all runs but the held-out ones; what those say.

  Raises:
    ValueError: nothing is left to fit, or to hold out.
  """
  found = jobs_of(workdir)
  seeds = sorted({job.case.seed for job in found})
  chosen = set(holdout or [str(seeds[-1])])
  out = [job for job in found if chosen & _names(job)]
  unknown = chosen - {name for job in out for name in _names(job)}
  rest = [job for job in found if job not in out]
  faulty = [job for job in out if _comparable(job)]
  if unknown or not rest or not faulty:
    raise ValueError(
      f"--holdout={','.join(sorted(chosen))}: at least one run must be held out"
      f" and one left; seeds: {', '.join(map(str, seeds))}; policies: "
      f"{', '.join(sorted({job.case.policy for job in found}))}"
    )
  fitted = fit_lib.fit([events_of(workdir, job) for job in rest], machine)
  return fitted, compare(workdir, found, faulty, fitted)


def fit_all(workdir: pathlib.Path, machine: str) -> Fitted:
  """Timing of all runs of a work directory."""
  runs = [events_of(workdir, job) for job in jobs_of(workdir)]
  return fit_lib.fit(runs, machine)


def cross(
  workdir: pathlib.Path, by: str, machine: str
) -> tuple[Fitted, list[Measured]]:
  """Holds out one seed (policy, scenario) after the other; fits to all runs.

  Raises:
    ValueError: there is only one of them.
  """
  if by not in CROSS:
    raise ValueError(f"--cross={by}: choices: {', '.join(CROSS)}")
  jobs = jobs_of(workdir)
  faulty = [job for job in jobs if _comparable(job)]
  names = dict.fromkeys(str(getattr(job.case, by)) for job in faulty)
  if len(names) < 2:
    raise ValueError(f"--cross={by}: there is only {', '.join(names)}")
  found = [m for n in names for m in calibrate(workdir, [n], machine)[1]]
  return fit_all(workdir, machine), found


def _names(job: Job) -> set[str]:
  """By what a run can be held out."""
  case = job.case
  return {str(case.seed), case.policy, case.scenario, str(job.place)}


def held_out_errors(found: Sequence[Measured]) -> dict[str, dict[str, float]]:
  """Medians, in seconds and in steps, for the file and its tables."""
  said: dict[str, dict[str, float]] = {}
  for key, at_speed in (
    ("held_out_error", False), ("held_out_error_in_steps", True),
  ):  # fmt: skip
    said[key] = {
      name: float(np.median(off))
      for name in METRICS
      if (off := errors(found, name, at_speed))
    }
  return said


def main(argv: Sequence[str]) -> int:
  """Fits, prints, writes; the exit status."""
  values = flags.FlagValues()
  for name, about in (
    ("runs", "A work directory of experiments.run."),
    ("out", "Where the calibration goes."),
    ("holdout", "Seeds, policies or scenarios that are held out."),
    ("cross", "What is held out in turn: seed, policy or scenario."),
    ("also", "A work directory for what those runs don't show."),
    ("machine", "Whose seconds these are, in words."),
  ):
    flags.DEFINE_string(name, None, about, flag_values=values)
  try:
    values(list(argv))
    if not values.runs or not values.out:
      raise ValueError("needed are --runs=DIR and --out=FILE")
    workdir, machine = pathlib.Path(values.runs), values.machine or "a machine"
    if values.cross:
      fitted, found = cross(workdir, values.cross, machine)
    else:
      holdout = values.holdout.split(",") if values.holdout else None
      fitted, found = calibrate(workdir, holdout, machine)
    more = fit_all(pathlib.Path(values.also), machine) if values.also else None
  except (ValueError, flags.Error) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  fitted = dataclasses.replace(
    fitted, about={**fitted.about, **held_out_errors(found)}
  )
  if more is not None:
    fitted = fitted.with_rest_of(more)
  write_text(values.out, fitted.to_json())
  print(f"{fitted.note}\n{summary(found)}\nIn {values.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
