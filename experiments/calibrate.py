"""Fits the simulation's timing to real runs, and says how far off it is.

  python -m experiments.calibrate --runs=runs/quickstart --out=FILE.json \
      [--holdout=2] [--machine="2 cores"]

RUNS is a work directory of `experiments.run`, on any runtime but the simulated.
Runs whose seed, policy, scenario or place (SCENARIO/POLICY/seedN) is in
--holdout (commas; default: the last seed) are left out of the fit. Then each of
them is simulated with the fitted numbers: same policy,
faults and requests. Printed is how far the simulated stall and resume time are
from the real ones, |simulated - real| / real: the median and p90 over runs. The
file goes into --config.sim.calibration=FILE.
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

METRICS = (
  "affected_stall_s", "resume_s", "affected_stall_steps", "service_stall_s",
  "step_s",
)  # fmt: skip
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


def summary(found: Sequence[Measured]) -> str:
  """The errors: a line a metric, and the runs themselves."""
  lines = []
  for name in METRICS:
    off = fit_lib.errors(((m.real, m.simulated) for m in found), name)
    if off:
      lines.append(
        f"{name}: median error {np.median(off):.0%}, p90"
        f" {np.quantile(off, 0.9):.0%} over {len(off)} held-out runs"
      )
  for m in found:
    parts = [
      f"{name} {m.real[name]:.4g} real, {m.simulated[name]:.4g} simulated"
      for name in METRICS[:2]
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
    ("machine", "Whose seconds these are, in words."),
  ):
    flags.DEFINE_string(name, None, about, flag_values=values)
  try:
    values(list(argv))
    if not values.runs or not values.out:
      raise ValueError("needed are --runs=DIR and --out=FILE")
    holdout = values.holdout.split(",") if values.holdout else None
    fitted, found = calibrate(
      pathlib.Path(values.runs), holdout, values.machine or "this machine"
    )
  except (ValueError, flags.Error) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  off = {
    name: fit_lib.errors(((m.real, m.simulated) for m in found), name)
    for name in METRICS
  }
  medians = {n: float(np.median(each)) for n, each in off.items() if each}
  fitted = dataclasses.replace(
    fitted, about={**fitted.about, "held_out_error": medians}
  )
  write_text(values.out, fitted.to_json())
  print(f"{fitted.note}\n{summary(found)}\nIn {values.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
