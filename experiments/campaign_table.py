"""The numbers of a campaign: a line for each case, a row for each policy.

Counts are over all cases. A time counts from one event of the history to
another (`report.recovery_phases`), once for each fault that took or stopped
ranks, and the percentiles are over all of them, whatever the case's verdict: a
case that isn't valid shows in its column and is left out of no other. Where a
fault has no time (never detected, say) the notes say how many.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

from experiments import campaign_faults
from experiments.campaign_faults import STRIKING, TIMES, Numbers
from resilient_moe import report
from resilient_moe.faults import RANKLESS_KINDS, Fault
from resilient_moe.report import exactness
from resilient_moe.report.history import of_kind
from resilient_moe.report.latency import percentiles
from resilient_moe.report.latex import escape, heading
from resilient_moe.report.table import grid, short
from resilient_moe.runtime.case import Case

EVERYTHING = "all"

NOTES = """\
Seconds, over all faults that took or stopped ranks (p50 and p99): detect: the
fault to the detector's report; resume: the report to the first new token of an
answer that it paused; redundancy: the fault to full redundancy. A kill is a
rank lost or stuck, or the store or supervisor killed. Recovered: cases served
to their end. Changed: emitted tokens that differ from the fault-free run
(lossy policies may). Exact: answers equal to the fault-free run's, of all its
answers. -: nothing to measure.
"""


@dataclasses.dataclass(frozen=True)
class Line:
  """One case; the fields are the columns of `campaign.csv`."""

  scenario: str
  policy: str
  seed: int
  deployment: str
  faults: int
  kills: int
  recovered: bool
  verdict: str
  lost_requests: int
  changed_tokens: int | None  # None: there is no twin to compare with
  repeated_tokens: int
  exact: float | None  # fraction of the twin's answers
  detect_s: Numbers
  resume_s: Numbers
  redundancy_s: Numbers
  struck: tuple[str, ...]  # this and the next as in `campaign_faults`
  resume_steps: Numbers
  own_gaps: Numbers
  others_gaps: Numbers
  repeat: str
  answers: int  # of the twin; this and `equal` are not in the csv
  equal: int

  @property
  def valid(self) -> bool:
    return self.verdict in report.VALID


COLUMNS = [field.name for field in dataclasses.fields(Line)][:-2]


def kills(faults: Iterable[tuple[str, Sequence[int]]]) -> int:
  """Processes that faults of these kinds, at these ranks, kill or stop."""
  return sum(
    len(ranks) if kind in STRIKING else kind in RANKLESS_KINDS
    for kind, ranks in faults
  )


def planned_kills(faults: Iterable[Fault]) -> int:
  """As many as strike, if all faults do; a warned rank drains in time."""
  return kills((fault.kind, fault.ranks) for fault in faults)


def line_of(
  case: Case,
  events: list[report.Event],
  twin: list[report.Event] | None,
  verdict: dict[str, Any],
  repeat: str,
) -> Line:
  """Measures one case; without a twin, nothing is known to be exact."""
  faults = of_kind(events, "fault")
  if twin is None:
    asked, done = len(case.requests), exactness.finished_sequences(events)
    same, exact, changed = (asked, asked - len(done), 0), None, None
  else:
    same = exactness.compared(events, twin)
    exact = same.equal / max(1, same.finished)
    changed = exactness.changed_tokens(events, twin)
  answers, lost, equal = same
  return Line(
    scenario=case.scenario,
    policy=case.policy,
    seed=case.seed,
    deployment=case.deployment,
    faults=len(faults),
    kills=kills((fault["kind"], fault["ranks"]) for fault in faults),
    recovered="error" not in verdict and bool(of_kind(events, "end")),
    verdict=str(verdict.get("overall", "unknown")),
    lost_requests=lost,
    changed_tokens=changed,
    repeated_tokens=exactness.repeated_tokens(events),
    exact=exact,
    **campaign_faults.fault_numbers(case, events, twin),
    repeat=repeat,
    answers=answers,
    equal=equal,
  )


def to_csv(lines: Iterable[Line]) -> str:
  """A line for each case; in lists, an empty place: the fault has no time."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(COLUMNS)
  for line in lines:
    writer.writerow([_csv_cell(getattr(line, name)) for name in COLUMNS])
  return text.getvalue()


def _csv_cell(value: Any) -> str:
  if isinstance(value, tuple):
    return ";".join(_csv_cell(each) for each in value)
  if value is None:
    return ""
  return str(value).lower() if isinstance(value, bool) else str(value)


def rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
  """The header; a row for each deployment and policy, and for all of them."""
  header = ["policy", "deployment", "cases", "kills", "recovered"]
  header += ["verdict_true", "lost_requests", "changed_tokens"]
  header += ["repeated_tokens", "exact_outputs"]
  for name in TIMES:
    header += [f"{name.removesuffix('_s')}_p{q}" for q in (50, 99)]
  body, deployments = [], dict.fromkeys(line.deployment for line in lines)
  for deployment in deployments:
    here = [line for line in lines if line.deployment == deployment]
    for policy in dict.fromkeys(line.policy for line in here):
      mine = [line for line in here if line.policy == policy]
      body.append([policy, deployment, *_cells(mine)])
    body.append([EVERYTHING, deployment, *_cells(here)])
  if len(deployments) > 1:
    body.append([EVERYTHING, EVERYTHING, *_cells(lines)])
  return header, body


def _cells(lines: Sequence[Line]) -> list[str]:
  """The row of some cases, without its name."""
  changed = [line.changed_tokens for line in lines]
  counts = (
    len(lines),
    sum(line.kills for line in lines),
    sum(line.recovered for line in lines),
    sum(line.valid for line in lines),
    sum(line.lost_requests for line in lines),
    sum(count for count in changed if count is not None),
    sum(line.repeated_tokens for line in lines),
  )
  equal, answers = (
    sum(getattr(line, name) for line in lines) for name in ("equal", "answers")
  )
  cells = [*map(str, counts), f"{equal}/{answers}"]
  for name in TIMES:
    values = [s for line in lines for s in getattr(line, name) if s is not None]
    found = percentiles(name, values).values()
    cells += ["-" if value is None else short(value) for value in found]
  return cells


def missing(lines: Sequence[Line]) -> list[str]:
  """A sentence for each policy and time that some of its faults lack."""
  said = []
  for policy in dict.fromkeys(line.policy for line in lines):
    mine = [line for line in lines if line.policy == policy]
    for name in TIMES:
      values = [value for line in mine for value in getattr(line, name)]
      lacking = values.count(None)
      if lacking:
        said.append(
          f"{policy}: {lacking} of {len(values)} faults have no {name}"
        )
  return said


def to_markdown(lines: Sequence[Line], origin: Sequence[str]) -> str:
  """The table, what it was measured on, and every case that isn't valid.

  Args:
    lines: the cases.
    origin: sentences on where the numbers come from.
  """
  parts = ["### Campaign\n", *(f"{each}\n" for each in origin)]
  parts += [grid(*rows(lines), left=(0, 1)), NOTES]
  by_role = campaign_faults.rows(lines)
  if by_role[1]:
    parts += [grid(*by_role, left=(0, 1, 2)), campaign_faults.NOTES]
  lacking = missing(lines)
  if lacking:
    parts.append("Times that are missing: " + "; ".join(lacking) + ".\n")
  invalid = [line for line in lines if not line.valid]
  if invalid:
    parts.append(f"Not valid: {len(invalid)} of {len(lines)} cases.\n")
  for line in invalid:
    place = f"{line.scenario}/{line.policy}/seed{line.seed}"
    parts.append(f"- {place}: verdict {line.verdict}\n\n      {line.repeat}\n")
  return "\n".join(parts)


def to_latex(lines: Sequence[Line]) -> str:
  """Both tables as a `tabular`; needs the package booktabs and no other."""
  written = [
    "% \\usepackage{booktabs} in the preamble, then \\input this file.",
    *_tabular(*rows(lines), NOTES, names=2),
  ]
  header, body = campaign_faults.rows(lines)
  if body:
    notes = campaign_faults.NOTES
    written += ["", *_tabular(header, body, notes, names=3)]
  return "\n".join([*written, ""])


def _tabular(
  header: list[str], body: list[list[str]], notes: str, names: int
) -> list[str]:
  """Lines of a `tabular` whose first columns are names."""
  written = [f"% {note}" for note in notes.splitlines()]
  columns = "l" * names + "r" * (len(header) - names)
  written += [
    rf"\begin{{tabular}}{{{columns}}}",
    rf"\toprule {' & '.join(map(heading, header))} \\ \midrule",
  ]
  for cells in body:
    if cells[0] == EVERYTHING:
      written.append(r"\midrule")
    shown = ["--" if cell == "-" else escape(cell) for cell in cells]
    written.append(" & ".join(shown) + r" \\")
  return [*written, r"\bottomrule", r"\end{tabular}"]
