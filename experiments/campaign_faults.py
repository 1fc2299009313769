"""The numbers of single faults of a campaign, and their table by role.

Of each fault that took or stopped ranks: whom it struck, its times, and how
long requests waited around it. Where attention and experts are apart an expert
rank's loss touches every request, an attention rank's only its own: pooled,
neither could be seen.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from resilient_moe import report
from resilient_moe.report.history import Event, of_kind
from resilient_moe.report.latency import percentiles
from resilient_moe.report.metrics import NO_DETECTION
from resilient_moe.report.table import short
from resilient_moe.runtime.case import Case

# What takes ranks out of service; a warning is no failure to be detected.
STRIKING = ("rank_lost", "rank_stuck")
TIMES = ("detect_s", "resume_s", "redundancy_s")
Numbers = tuple[float | None, ...]  # a fault each; None: not reached

NOTES = """\
By whom a fault struck: AW (attention), EW (experts), AW+EW (both at once; roles
as launched), or ranks that do both. Resume in fault-free median steps. Waits:
the longest gap between two tokens from the fault to the next fault, in
fault-free median gaps: `own` of requests that the fault touched (an expert
rank's loss touches all), `others` of those that it did not.
"""
# Of the table: column, field of a line, what it is multiplied by.
_SHOWN = (
  ("detect_ms", "detect_s", 1e3),
  ("resume_ms", "resume_s", 1e3),
  ("resume_steps", "resume_steps", 1.0),
  ("own_wait_gaps", "own_gaps", 1.0),
  ("others_wait_gaps", "others_gaps", 1.0),
)


class Faults(Protocol):
  """What a line of the campaign says of its faults, each a place."""

  @property
  def deployment(self) -> str: ...
  @property
  def policy(self) -> str: ...
  @property
  def struck(self) -> tuple[str, ...]: ...


def role_struck(ranks: Iterable[int], attention: int) -> str:
  """The roles of these ranks, where the first `attention` ones attend."""
  if not attention:
    return "rank"
  roles = {"AW" if rank < attention else "EW" for rank in ranks}
  return "+".join(sorted(roles))


def fault_numbers(
  case: Case, events: list[Event], twin: list[Event] | None
) -> dict[str, Any]:
  """By field of a line, a number for each fault that took or stopped ranks."""
  faults = of_kind(events, "fault")
  taken = [f["kind"] in STRIKING for f in faults]
  phases = [
    each
    for each, took in zip(report.recovery_phases(events), taken, strict=True)
    if took
  ]
  found = _times(phases)
  if case.runtime in NO_DETECTION:
    found["detect_s"] = ()
  step_s = report.usual(events, twin).step_s
  found["resume_steps"] = tuple(
    None if s is None or not step_s else s / step_s for s in found["resume_s"]
  )
  found |= _waits(events, twin, taken)
  struck = (f for f, took in zip(faults, taken, strict=True) if took)
  roles = tuple(role_struck(f["ranks"], case.attention) for f in struck)
  return {"struck": roles, **found}


def _times(phases: Sequence[report.Phases]) -> dict[str, Numbers]:
  def between(start_s: float | None, stop_s: float | None) -> float | None:
    return None if start_s is None or stop_s is None else stop_s - start_s

  return {
    "detect_s": tuple(between(p.fault_s, p.failure_s) for p in phases),
    "resume_s": tuple(between(p.failure_s, p.first_s) for p in phases),
    "redundancy_s": tuple(between(p.fault_s, p.redundant_s) for p in phases),
  }


def _waits(
  events: list[Event], twin: list[Event] | None, taken: list[bool]
) -> dict[str, Numbers]:
  """The longest gaps around each fault, in usual ones."""
  usual_s = report.usual(events, twin).answer_gap_s
  # Without a usual gap to take off, the stalls are the whole gaps.
  whole = report.Usual(None, None, None)
  stalls = report.fault_stalls(events, whole) if taken else []
  mine = [each for each, took in zip(stalls, taken, strict=True) if took]

  def longest(gaps_s: Iterable[float]) -> float | None:
    longest_s = max(gaps_s, default=None)
    return None if longest_s is None or not usual_s else longest_s / usual_s

  return {
    "own_gaps": tuple(longest(s.affected_s.values()) for s in mine),
    "others_gaps": tuple(longest(s.unaffected_s.values()) for s in mine),
  }


def rows(lines: Sequence[Faults]) -> tuple[list[str], list[list[str]]]:
  """The header, and a row for each deployment, policy and role struck."""
  header = ["policy", "deployment", "struck", "faults"]
  for name, _, _ in _SHOWN:
    header += [f"{name}_p50", f"{name}_p99"]
  groups = dict.fromkeys(
    (line.deployment, line.policy, role)
    for line in lines
    for role in sorted(set(line.struck))
  )
  body = [
    [policy, deployment, role, *_cells(lines, (deployment, policy, role))]
    for deployment, policy, role in groups
  ]
  return header, body


def _cells(
  lines: Sequence[Faults], group: tuple[str, str, str]
) -> list[str]:
  """How many faults there are in a group, and their percentiles."""
  deployment, policy, role = group
  mine = [
    (line, place)
    for line in lines
    if (line.deployment, line.policy) == (deployment, policy)
    for place, struck in enumerate(line.struck)
    if struck == role
  ]
  cells = [str(len(mine))]
  for _, field, scale in _SHOWN:
    numbers = [(getattr(line, field), place) for line, place in mine]
    values = [
      each[place] * scale
      for each, place in numbers
      if each and each[place] is not None
    ]
    found = percentiles(field, values).values()
    cells += ["-" if value is None else short(value) for value in found]
  return cells
