"""What clients feel over a whole run: first tokens, gaps, goodput."""

import numpy as np

from resilient_moe.report import ledger as ledger_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.history import Event


def ttft_samples(events: list[Event]) -> list[float]:
  """Accepted to first token, in seconds, of each answer that has one."""
  answers = ledger_lib.ledger_of(events).answers().values()
  return [a.progress[0].t_s - a.accepted_s for a in answers if a.progress]


def percentiles(name: str, values: list[float]) -> dict[str, float | None]:
  """`NAME_p50` and `NAME_p99`, in seconds."""
  return {
      f"{name}_p{q}": float(np.percentile(values, q)) if values else None
      for q in (50, 99)
  }


def goodput(
    events: list[Event], ttft_slo_s: float, tbt_slo_s: float
) -> float | None:
  """Tokens per second of the finished answers that met the objective.

  An answer meets it if its first token came within `ttft_slo_s` of its
  acceptance and the mean gap between its new tokens is at most `tbt_slo_s`.
  The time is from the first acceptance to the last emission.
  """
  answers = ledger_lib.ledger_of(events).answers().values()
  times = stalls_lib.emission_times(events)
  if not times:
    return None
  good = 0
  for answer in answers:
    new = answer.progress
    if answer.finished is None or not new:
      continue
    mean_s = (new[-1].t_s - new[0].t_s) / max(1, len(new) - 1)
    prompt = new[0].t_s - answer.accepted_s <= ttft_slo_s
    if prompt and mean_s <= tbt_slo_s:
      good += len(new)
  span_s = times[-1] - min(answer.accepted_s for answer in answers)
  return good / span_s if span_s > 0 else None
