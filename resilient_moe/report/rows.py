"""Rows of a table: the metrics of a policy in a scenario, over its seeds."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from resilient_moe.report import phases as phases_lib
from resilient_moe.report import runs as runs_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.checkers import Value
from resilient_moe.report.metrics import Number, measure, speedups

BASELINE = "restart_cached"

# The numeric columns, in the order of the table.
METRICS = (
    "detect_s",
    "false_alarms",
    "plan_s",
    "resume_s",
    "redundancy_s",
    "prepare_s",
    "redundancy_bytes",
    "ready_meshes",
    "service_stall_s",
    "affected_stall_s",
    "affected_stall_max_s",
    "unaffected_stall_max_s",
    "service_stall_steps",
    "affected_stall_steps",
    "affected_stall_max_steps",
    "unaffected_stall_max_steps",
    "service_speedup_vs_restart",
    "affected_speedup_vs_restart",
    "ttft_p50",
    "ttft_p99",
    "tbt_p50",
    "tbt_p99",
    "goodput_tokens_per_s",
    "ttft_slo_s",
    "tbt_slo_s",
    "tokens_recomputed",
    "kv_bytes_restored",
    "weight_bytes_moved",
    "healed_s",
    "exchange_bytes",
    "checkpoint_bytes",
    "checkpoint_ratio",
    "requests_lost",
    "tokens_exact",
    "overhead",
    "step_s",
    "usual_gap_s",
    "usual_service_gap_s",
    "horizon_s",
)

_FIRST = (runs_lib.TWIN, "restart", BASELINE)
_BOOTSTRAP = 2000
_ENOUGH = 5  # seeds, for a bootstrap to mean something


class Stat(NamedTuple):
  """A median over seeds with its interval, and the samples."""

  median: float
  low: float
  high: float
  samples: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """One policy in one scenario.

  Attributes:
    seeds: how many runs there are, valid or not.
    verdict: the worst of the runs' verdicts.
    failed: the checkers (or what else) that made a run invalid.
    stats: by column; None where no run gives that number. Empty unless valid.
    stall_by_action: of the affected answers; seconds, median over seeds.
    restart_stages: seconds of each stage of a restart, median over seeds.
    timing: of simulated runs, what their seconds were calibrated on.
  """

  scenario: str
  policy: str
  runtime: str
  deployment: str
  seeds: int
  verdict: str
  failed: tuple[str, ...]
  stats: dict[str, Stat | None]
  stall_by_action: dict[str, float]
  restart_stages: dict[str, float]
  timing: tuple[str, ...] = ()

  @property
  def valid(self) -> bool:
    return bool(self.stats)


def stat(values: Iterable[Number]) -> Stat | None:
  """Median and interval of the values that exist.

  The interval is the range for fewer than 5 values, else the 95% interval of
  the bootstrapped median (always the same resamples).
  """
  samples = tuple(float(value) for value in values if value is not None)
  if not samples:
    return None
  if len(samples) < _ENOUGH:
    low, high = min(samples), max(samples)
  else:
    generator = np.random.default_rng(0)
    drawn = generator.choice(samples, (_BOOTSTRAP, len(samples)))
    medians = np.median(drawn, axis=1)
    low, high = (float(q) for q in np.percentile(medians, (2.5, 97.5)))
  return Stat(float(np.median(samples)), low, high, samples)


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
  """By key, over the runs that have it, in the order of appearance."""
  values: dict[str, list[float]] = {}
  for run in runs:
    for name, seconds in run.items():
      values.setdefault(name, []).append(seconds)
  return {name: float(np.median(each)) for name, each in values.items()}


def _measure(
    run: runs_lib.Run,
    runs: list[runs_lib.Run],
    slo: dict[str, float],
) -> tuple[dict[str, Number], dict[str, float]]:
  """Metrics and stall breakdown of a valid run, judged beside its baseline."""
  twin = runs_lib.find(runs, run, runs_lib.TWIN)
  quiet = twin.events if twin and twin.valid else None
  base = runs_lib.find(runs, run, BASELINE)
  # A baseline that doesn't check must not make anybody look good.
  events = base.events if base and base.valid else None
  horizon_s = phases_lib.recovery_time_s(events) if events else None
  measured = measure(run.events, quiet, horizon_s=horizon_s, **slo)
  reference = (
      measure(events, quiet, horizon_s=horizon_s, **slo) if events else None
  )
  measured.update(speedups(measured, reference))
  norm = stalls_lib.usual(run.events, quiet)
  spent = phases_lib.stall_by_action(
      phases_lib.recovery_phases(run.events),
      stalls_lib.fault_stalls(run.events, norm, horizon_s),
  )
  return measured, spent


def _row(
    key: tuple[str, str, str, str],
    group: list[runs_lib.Run],
    runs: list[runs_lib.Run],
    slo: dict[str, float],
) -> Row:
  invalid = [run for run in group if not run.valid]
  if invalid:
    found = {run.verdict["overall"] for run in invalid}
    worst = "false" if "false" in found else "unknown"
    failed = [f for run in invalid for f in run.verdict.get("failed", [])]
    names = tuple(dict.fromkeys(failed)) or ("unnamed",)
    return Row(*key, len(group), worst, names, {}, {}, {})
  # The tolerance is the weaker promise, so one such run marks them all.
  found = {run.verdict["overall"] for run in group}
  verdict = str(Value.TOLERANCE if Value.TOLERANCE in found else Value.TRUE)
  try:
    measured = [_measure(run, runs, slo) for run in group]
  except Exception as error:  # noqa: BLE001
    # One odd history must not cost the table of a long sweep.
    failed = [f"metrics crashed: {type(error).__name__}: {error}"]
    return Row(*key, len(group), "unknown", tuple(failed), {}, {}, {})
  return Row(
      *key,
      len(group),
      verdict,
      (),
      {name: stat(m.get(name) for m, _ in measured) for name in METRICS},
      _medians([spent for _, spent in measured]),
      _medians([phases_lib.restart_stages(run.events) for run in group]),
      tuple(dict.fromkeys(r.run["timing"] for r in group if "timing" in r.run)),
  )


def _order(key: tuple[str, str, str, str]) -> tuple[str, int, tuple[str, ...]]:
  scenario, policy, *_ = key
  first = _FIRST.index(policy) if policy in _FIRST else len(_FIRST)
  return scenario, first, key


def rows_of(runs: list[runs_lib.Run], **slo: float) -> list[Row]:
  """One row for each (scenario, policy, runtime, deployment), over seeds.

  Args:
    runs: of `read_runs`. `none` is the twin of the same scenario and seed,
      `restart_cached` the baseline of speedups and of the horizon.
    **slo: `ttft_slo_s`, `tbt_slo_s` as in `measure`.
  """
  groups = collections.defaultdict(list)
  for run in runs:
    runtime = run.run.get("runtime", "unknown")
    deployment = run.run.get("deployment", "unknown")
    groups[run.scenario, run.policy, runtime, deployment].append(run)
  return [
      _row(key, groups[key], runs, slo) for key in sorted(groups, key=_order)
  ]
