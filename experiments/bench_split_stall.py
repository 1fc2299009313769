"""Waits of requests after a killed worker, beside a restart's.

`configs/disaggregated` on processes, as a comparison of `experiments.run`:
runs that are in the work directory are not repeated. Steps are median decode
steps of the fault-free twin.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from configs import disaggregated
from experiments import bench_models as models
from experiments import bench_split as split
from experiments import cases, settings, sweep
from experiments.bench_anatomy import copyto_rate
from experiments.bench_record import Cell, Result, Target, stat
from resilient_moe import report
from resilient_moe.runtime.gateway import run_case

POLICY, RESTART = "tarragon", "restart_cached"
EW_LOST, AW_LOST = "ew_lost", "aw_lost"
OF_COPY_RATE = 0.5  # what restored bytes may take
LIMIT_STEPS = {EW_LOST: 2.0, AW_LOST: 4.0}
LIMIT_SPEEDUP = {EW_LOST: 100.0, AW_LOST: 50.0}
LIMIT_OTHERS_GAPS = 3.0
AROUND_S = 120.0  # longer than any run goes on after its fault


@dataclasses.dataclass(frozen=True)
class Waits:
  """One run's; seconds, unless named otherwise."""

  verdict: str
  step_s: float
  detect_s: float | None  # from the fault
  affected_s: tuple[float, ...]  # from the detection to the next token
  restored: int  # bytes
  copy_s: float  # that those may take
  others_gaps: tuple[float, ...]  # longest gap of the others, in usual ones
  stall_s: float | None  # the affected ones' median
  speedup: float | None  # against the restart
  stages: dict[str, float]  # of the restart

  @property
  def worst_steps(self) -> float | None:
    """The longest wait, beside its copy, in median steps."""
    if not self.affected_s or self.verdict not in report.VALID:
      return None
    return max(0.0, max(self.affected_s) - self.copy_s) / self.step_s


def run(bench: models.Settings, workdir: pathlib.Path) -> Result:
  """Runs what has not been run; measures."""
  folder = workdir / "split_stall"
  chosen = comparison(bench)
  jobs = cases.jobs(chosen)
  todo = sweep.pending(folder, chosen, jobs)
  sweep.start(folder, chosen, {"tool": "experiments.bench"})
  for number, job in enumerate(jobs, 1):
    if job in todo:
      sweep.run(job, folder, run_case, lambda event: None)
    told = sweep.describe(folder, job)
    split.say(f"{number} of {len(jobs)}, {job.place}: {told}")
  found: dict[str, list[Waits]] = {}
  for job in jobs:
    if job.case.policy == POLICY:
      found.setdefault(job.case.scenario, []).append(_of_job(folder, job))
  return result(found)


def comparison(bench: models.Settings) -> settings.Settings:
  """`configs/disaggregated`; the twin of a seed serves all scenarios."""
  config = disaggregated.get_config()
  config.shared_twin = True
  with config.unlocked():
    config.update(bench.split.stall)
  return settings.read(config)


def _of_job(folder: pathlib.Path, job: cases.Job) -> Waits:
  events = _events(folder / job.place)
  restart = folder / job.place.parent.parent / RESTART / job.place.name
  twin = sweep.twin_folder(folder, job.twin_place)
  return waits(events, _events(twin), _events(restart))


def _events(folder: pathlib.Path) -> list[report.Event]:
  events = sweep.events_of(folder)
  if events is None:
    raise RuntimeError(f"{folder} has no history: see engine.log")
  return events


def waits(
  events: list[report.Event], twin: list[report.Event],
  restart: list[report.Event],
) -> Waits:  # fmt: skip
  """Measures a run with one fault."""
  horizon_s = report.recovery_time_s(restart)
  measured = report.measure(events, twin, horizon_s=horizon_s)
  baseline = report.measure(restart, twin, horizon_s=horizon_s)
  speedup = report.speedups(measured, baseline)["affected_speedup_vs_restart"]
  norm = report.usual(events, twin)
  (phases,) = report.recovery_phases(events)
  detected_s = phases.failure_s or phases.fault_s
  lines = report.request_timelines(events, AROUND_S, twin)
  restored = int(measured["kv_bytes_restored"] or 0)
  rate = OF_COPY_RATE * copyto_rate(restored) if restored else 1.0
  return Waits(
    verdict=str(report.verdict(events, twin)["overall"]),
    step_s=norm.step_s or 1e-9,
    detect_s=measured["detect_s"],
    affected_s=tuple(_next_s(x, detected_s) for x in lines if x.affected),
    restored=restored,
    copy_s=restored / rate,
    others_gaps=tuple(_gaps(x) for x in lines if not x.affected and x.gap_s),
    stall_s=measured["affected_stall_s"],
    speedup=speedup,
    stages=report.restart_stages(restart),
  )


def _next_s(line: report.RequestTimeline, from_s: float) -> float:
  """Until its next token; as long as the run was looked at, if none came."""
  return min((t for t in line.tokens_s if t > from_s),
             default=line.window_s[1]) - from_s  # fmt: skip


def _gaps(line: report.RequestTimeline) -> float:
  assert line.gap_s is not None
  return (line.gap_s[1] - line.gap_s[0]) / (line.usual_s or 1e-9)


def result(found: dict[str, list[Waits]]) -> Result:
  """Tables and targets of the runs by scenario."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets: list[Target] = []
  notes = [
    "from the detection: from the first report of the dead rank to the next "
    "token of each affected request, less the restored bytes at half of "
    "np.copyto's rate; worst: of a run's requests, median of the runs",
  ]
  for scenario, runs in found.items():
    rows.append(row(scenario, runs))
    targets += _targets(scenario, runs)
    affected = [s for r in runs for s in r.affected_s]
    samples[f"{scenario}/affected_s"] = affected
    others = [g for r in runs for g in r.others_gaps]
    samples[f"{scenario}/others_gaps"] = others
    samples[f"{scenario}/worst_steps"] = _known([r.worst_steps for r in runs])
    samples[f"{scenario}/speedup"] = _known([r.speedup for r in runs])
    samples[f"{scenario}/step_s"] = [r.step_s for r in runs]
    spent = ", ".join(f"{k} {v:.2f} s" for k, v in runs[0].stages.items())
    notes.append(f"{scenario}: {RESTART}'s stages: {spent}")
  return Result("split_stall", rows, samples, targets, notes)


def row(scenario: str, runs: Sequence[Waits]) -> dict[str, Cell]:
  """Medians over the runs of a scenario."""
  valid = all(r.verdict in report.VALID for r in runs)
  waited = [s / r.step_s for r in runs for s in r.affected_s]
  others = [g for r in runs for g in r.others_gaps]
  return {
    "scenario": scenario, "seeds": len(runs),
    "verdict": "true" if valid else "INVALID",
    "step ms": _ms([r.step_s for r in runs]),
    "detect ms": _ms([r.detect_s for r in runs]),
    "from detection, median steps": _median(waited),
    "p95 steps": float(np.percentile(waited, 95)) if waited else None,
    "worst less copy, steps": _median([r.worst_steps for r in runs]),
    "restored KB": _median([r.restored / 1e3 for r in runs]),
    "others' longest gap, median gaps": max(others, default=None),
    "stall ms": _ms([r.stall_s for r in runs]),
    "restart / it": _median([r.speedup for r in runs]),
  }


def _targets(scenario: str, runs: Sequence[Waits]) -> list[Target]:
  who = "an EW" if scenario == EW_LOST else "an AW"
  found = [
    Target(
      f"{who} lost: worst wait of the affected, beyond detection and copy",
      _median([r.worst_steps for r in runs]), LIMIT_STEPS[scenario],
      "median steps",
    ),
    Target(
      f"{who} lost: {RESTART}'s stall over {POLICY}'s",
      _median([r.speedup for r in runs]), LIMIT_SPEEDUP[scenario], "times",
      at_most=False,
    ),
  ]  # fmt: skip
  others = [max(r.others_gaps) for r in runs if r.others_gaps]
  if scenario == AW_LOST:
    found.append(Target(
      f"{who} lost: longest gap of requests on others",
      max(others, default=None), LIMIT_OTHERS_GAPS, "median gaps",
    ))  # fmt: skip
  return found


def _known(values: Sequence[float | None]) -> list[float]:
  return [v for v in values if v is not None]


def _median(values: Sequence[float | None]) -> float | None:
  known = _known(values)
  return stat(known).median if known else None


def _ms(seconds: Sequence[float | None]) -> float | None:
  found = _median(seconds)
  return None if found is None else 1e3 * found
