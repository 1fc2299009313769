"""Fits the simulation's timing to real runs, and says how far off it is.

  python -m experiments.calibrate --runs=runs/quickstart --out=FILE.json \
      [--holdout=2 | --cross=policy] [--machine="2 cores"]

RUNS is a work directory of `experiments.run`, on any runtime but the simulated.
Runs whose seed, policy, scenario or place (SCENARIO/POLICY/seedN) is in
--holdout (commas; default: the last seed) are left out of the fit. Then each of
them is simulated with the fitted numbers: same policy, faults and requests.
--cross=seed (or policy, or scenario) holds out one of these after the other,
and fits FILE to all runs.

Printed is how far the simulated stall and resume time are from the real ones,
|simulated - real| / real: the median and p90 over runs, in seconds and *at the
run's speed*: simulated seconds times how much slower than the calibrated the
machine was in that run, which its decode steps before the fault say. On a
machine that others use, the same run twice differs more than twofold in
seconds. The file goes into --config.sim.calibration=FILE.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import flags

from experiments import cases, settings, sweep
from experiments.cases import TWIN, Job
from experiments.simulated import simulated_case
from resilient_moe import report
from resilient_moe.report import Event, History
from resilient_moe.report.rows import BASELINE
from resilient_moe.report.runs import write_text
from resilient_moe.sim import fit as fit_lib
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.fitted import Fitted
from resilient_moe.sim.run import Run

METRICS = ("affected_stall_s", "resume_s")
CROSS = ("seed", "policy", "scenario")
BAD_INPUT = 2


class Measured(NamedTuple):
  """A held-out run: its numbers, and those of its simulation."""

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


def simulate(job: Job, fitted: Fitted) -> list[Event]:
  """The same case in virtual time."""
  clock = VirtualClock()
  history = History(clock.now)
  Run(simulated_case(job.case), fitted, clock, history).run()
  return list(history)


def compare(
  workdir: pathlib.Path, found: Sequence[Job], held_out: Sequence[Job],
  fitted: Fitted,
) -> list[Measured]:  # fmt: skip
  """Numbers of each held-out run beside its simulation's.

  Each against its own fault-free twin, over its own restart's horizon; those
  two may be among the fitted runs.
  """
  jobs = {job.place: job for job in found}
  real: dict[pathlib.PurePath, list[Event]] = {}
  ours: dict[pathlib.PurePath, list[Event]] = {}

  def add(place: pathlib.PurePath) -> pathlib.PurePath | None:
    if place not in jobs:
      return None
    if place not in real:
      real[place] = events_of(workdir, jobs[place])
      ours[place] = simulate(jobs[place], fitted)
    return place

  measured = []
  for job in held_out:
    if job.case.policy == TWIN:
      continue
    add(job.place)
    twin = add(job.twin_place) or add(cases.shared_twin(job))
    base = add(job.place.parent.parent / BASELINE / job.place.name)
    pair = []
    for events in (real, ours):
      horizon_s = report.recovery_time_s(events[base]) if base else None
      quiet = events[twin] if twin else None
      pair.append(report.measure(events[job.place], quiet, horizon_s=horizon_s))
    measured.append(Measured(job, *pair))
  return measured


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


def summary(found: Sequence[Measured]) -> str:
  """The errors: a line a metric, and the runs themselves."""
  lines = []
  for name in METRICS:
    for at_speed, how in ((True, "at the run's speed"), (False, "in seconds")):
      off = errors(found, name, at_speed)
      if off:
        lines.append(
          f"{name}, {how}: median error {np.median(off):.0%}, p90"
          f" {np.quantile(off, 0.9):.0%} over {len(off)} held-out runs"
        )
  for m in found:
    parts = [
      f"{name} {m.real[name]:.4g} real, {m.simulated[name]:.4g} simulated"
      for name in (*METRICS, "step_s")
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
  faulty = [job for job in out if job.case.policy != TWIN]
  if unknown or not rest or not faulty:
    raise ValueError(
      f"--holdout={','.join(sorted(chosen))}: at least one run must be held out"
      f" and one left; seeds: {', '.join(map(str, seeds))}; policies: "
      f"{', '.join(sorted({job.case.policy for job in found}))}"
    )
  fitted = fit_lib.fit([events_of(workdir, job) for job in rest], machine)
  return fitted, compare(workdir, found, faulty, fitted)


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
  faulty = [job for job in jobs if job.case.policy != TWIN]
  names = dict.fromkeys(str(getattr(job.case, by)) for job in faulty)
  if len(names) < 2:
    raise ValueError(f"--cross={by}: there is only {', '.join(names)}")
  found = [m for n in names for m in calibrate(workdir, [n], machine)[1]]
  fitted = fit_lib.fit([events_of(workdir, job) for job in jobs], machine)
  return fitted, found


def _names(job: Job) -> set[str]:
  """By what a run can be held out."""
  case = job.case
  return {str(case.seed), case.policy, case.scenario, str(job.place)}


def main(argv: Sequence[str]) -> int:
  """Fits, prints, writes; the exit status."""
  values = flags.FlagValues()
  for name, about in (
    ("runs", "A work directory of experiments.run."),
    ("out", "Where the calibration goes."),
    ("holdout", "Seeds, policies or scenarios that are held out."),
    ("cross", "What is held out in turn: seed, policy or scenario."),
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
  except (ValueError, flags.Error) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  medians = {
    name: float(np.median(off))
    for name in METRICS
    if (off := errors(found, name, at_speed=True))
  }
  fitted = dataclasses.replace(
    fitted, about={**fitted.about, "held_out_error": medians}
  )
  write_text(values.out, fitted.to_json())
  print(f"{fitted.note}\n{summary(found)}\nIn {values.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
