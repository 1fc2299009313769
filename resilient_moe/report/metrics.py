"""The numbers of one run, from its history (and its fault-free twin's).

Samples come first, statistics are derived from them: `samples` keeps every
measured value, `measure` reduces them to the columns of a table. Several
faults in one run: the stalls of all are put together; of the phases
(detect, plan, resume, redundancy) the median over the faults is taken.
"""

import dataclasses

from resilient_moe.report import exactness, latency, traffic
from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report import phases as phases_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.history import Event, of_kind, run_of

Number = float | int | None

# Actions whose bytes are expert weights.
_WEIGHT_ACTIONS = ("CopyExperts", "RestartInstance")
# Runtimes whose detector reports at once, so that there is nothing to measure.
NO_DETECTION = ("emulated", "logical")


@dataclasses.dataclass(frozen=True)
class Samples:
  """Every measured value of a run, in seconds, in the order of the history.

  Attributes:
    norm: the fault-free medians that stalls are measured against.
    phases: one for each fault.
    stalls: one for each fault.
    step_s: decode steps before the first fault, of this run.
    ttft_s: accepted to first token, of each answer that has one.
    tbt_s: gaps between neighbouring new tokens of the same answer.
  """

  norm: stalls_lib.Usual
  phases: list[phases_lib.Phases]
  stalls: list[stalls_lib.Stalls]
  step_s: list[float]
  ttft_s: list[float]
  tbt_s: list[float]


def samples(
    events: list[Event],
    twin: list[Event] | None = None,
    horizon_s: float | None = None,
) -> Samples:
  """Measures a run; `horizon_s` as in `fault_stalls`."""
  norm = stalls_lib.usual(events, twin)
  return Samples(
      norm,
      phases_lib.recovery_phases(events),
      stalls_lib.fault_stalls(events, norm, horizon_s),
      stalls_lib.step_samples(stalls_lib.before_faults(events)),
      latency.ttft_samples(events),
      stalls_lib.answer_gaps(events),
  )


def _phase_metrics(found: Samples, runtime: str) -> dict[str, Number]:
  def between(start: str, stop: str) -> float | None:
    pairs = [(getattr(p, start), getattr(p, stop)) for p in found.phases]
    return stalls_lib.median(
        [b - a for a, b in pairs if a is not None and b is not None]
    )

  measured = runtime not in NO_DETECTION
  return {
      "detect_s": between("fault_s", "failure_s") if measured else None,
      "plan_s": between("failure_s", "plan_s"),
      "resume_s": between("plan_s", "first_s"),
      "redundancy_s": between("fault_s", "redundant_s"),
  }


def _alarm_metrics(events: list[Event], runtime: str) -> dict[str, Number]:
  """What only a detector can get wrong."""
  measured = runtime not in NO_DETECTION
  return {
      "false_alarms": phases_lib.false_alarms(events) if measured else None
  }


def _prepare_metrics(events: list[Event]) -> dict[str, Number]:
  """What the policy kept standing when the first fault came."""
  prepares = of_kind(stalls_lib.before_faults(events), "prepare")
  names = ("redundancy_bytes", "ready_meshes")
  return {
      "prepare_s": sum(e["seconds"] for e in prepares) if prepares else None,
      **{n: prepares[-1][n] if prepares else None for n in names},
  }


def _stall_metrics(found: Samples) -> dict[str, Number]:
  affected = [v for s in found.stalls for v in s.affected_s.values()]
  others = [v for s in found.stalls for v in s.unaffected_s.values()]
  service = [s.service_s for s in found.stalls if s.service_s is not None]
  in_s = {
      "service_stall": max(service, default=None),
      "affected_stall": stalls_lib.median(affected),
      "affected_stall_max": max(affected, default=None),
      "unaffected_stall_max": max(others, default=None),
  }
  step_s = found.norm.step_s
  result: dict[str, Number] = {f"{n}_s": value for n, value in in_s.items()}
  for name, value in in_s.items():
    result[f"{name}_steps"] = (
        None if value is None or not step_s else value / step_s
    )
  return result


def _work_metrics(events: list[Event]) -> dict[str, Number]:
  moved = of_kind(events, "requests_moved")
  actions = of_kind(events, "action")
  weights = [a["bytes"] for a in actions if a["name"] in _WEIGHT_ACTIONS]
  return {
      "tokens_recomputed": sum(e["tokens"] or 0 for e in moved),
      "kv_bytes_restored": sum(
          e["bytes"] or 0 for e in moved if e["kind"] == "restore"
      ),
      "weight_bytes_moved": sum(b or 0 for b in weights),
  }


def _answer_metrics(
    events: list[Event], twin: list[Event] | None
) -> dict[str, Number]:
  """Lost and exact answers.

  Lost: finished in the twin and not here (without a twin: accepted and not
  finished). Exact: the fraction of the twin's finished answers that are
  finished here with the same tokens.
  """
  if twin is None:
    ours = exactness.finished_sequences(events)
    answers = ledger_lib.ledger_of(events).answers()
    return {"requests_lost": len(answers) - len(ours), "tokens_exact": None}
  finished, lost, equal = exactness.compared(events, twin)
  return {
      "requests_lost": lost,
      "tokens_exact": equal / finished if finished else None,
  }


def measure(
    events: list[Event],
    twin: list[Event] | None = None,
    *,
    horizon_s: float | None = None,
    ttft_slo_s: float = 2.0,
    tbt_slo_s: float = 0.2,
) -> dict[str, Number]:
  """The numbers of one run; None where a history gives none.

  Args:
    events: the history.
    twin: the history of the same run without faults.
    horizon_s: how long after a fault a stall may begin (the restart's time).
    ttft_slo_s: goodput's objective for the first token.
    tbt_slo_s: goodput's objective for the mean gap between tokens.

  Returns:
    By the names of DESIGN section 7, seconds unless named otherwise. Of note:
    `*_stall_*_steps`: the stall in fault-free median decode steps.
    `step_s`: the median decode step of this run before its first fault.
    `usual_gap_s`: the fault-free median gap that was subtracted.
  """
  run = run_of(events)
  found = samples(events, twin, horizon_s)
  return {
      **_phase_metrics(found, run["runtime"]),
      **_alarm_metrics(events, run["runtime"]),
      **_prepare_metrics(events),
      **_stall_metrics(found),
      **latency.percentiles("ttft", found.ttft_s),
      **latency.percentiles("tbt", found.tbt_s),
      "goodput_tokens_per_s": latency.goodput(events, ttft_slo_s, tbt_slo_s),
      "ttft_slo_s": ttft_slo_s,
      "tbt_slo_s": tbt_slo_s,
      **_work_metrics(events),
      **traffic.traffic_metrics(events),
      **_answer_metrics(events, twin),
      "step_s": stalls_lib.median(found.step_s),
      "usual_gap_s": found.norm.answer_gap_s,
      "usual_service_gap_s": found.norm.service_gap_s,
      "horizon_s": horizon_s,
      "overhead": run.get("overhead"),
  }


def speedups(
    policy: dict[str, Number], restart: dict[str, Number] | None
) -> dict[str, Number]:
  """How many times shorter the stalls are than `restart_cached`'s.

  Args:
    policy: the metrics of a policy.
    restart: those of `restart_cached` in the same scenario with the same
      seed; None if it was not run (or its history doesn't check).

  Returns:
    Restart / policy. A stall shorter than a usual gap can't be told from
    none, so the policy's counts as at least one usual gap.
  """
  result: dict[str, Number] = {}
  for name, usual in (
      ("service", "usual_service_gap_s"),
      ("affected", "usual_gap_s"),
  ):
    ours = policy[f"{name}_stall_s"]
    theirs = restart[f"{name}_stall_s"] if restart else None
    least = policy[usual]
    column = f"{name}_speedup_vs_restart"
    if ours is None or theirs is None or not least:
      result[column] = None
    else:
      result[column] = theirs / max(ours, least)
  return result
