"""What one run did, for looking at: a trace, and each request around a fault.

  python -m experiments.trace --run=DIR/SCENARIO/POLICY/seed0 --around_s=1.0

Writes into that folder trace.json (open it at https://ui.perfetto.dev) and,
if there was a fault, requests.md, requests.csv, requests.png, requests.pdf.
"""

import csv
import io
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from resilient_moe import report
from resilient_moe.report import style
from resilient_moe.report.figures import FAULT
from resilient_moe.report.runs import TWIN, write_text
from resilient_moe.report.table import grid, short

SHOWN = 48  # rows of a panel of the figure
HEADER = [
  "request", "affected", "rank_before", "rank_after", "last_before_s",
  "first_after_s", "stall_s", "stall_gaps", "open", "paused_s", "moved_s",
  "resumed_s",
]  # fmt: skip
NOTE = """\
Times count from the fault. `stall_s`: the longest gap between tokens, less a
usual one (the fault-free median); `stall_gaps`: in usual gaps. `open`: no token
ended it. -: nothing to tell, or it did not run at the fault.
"""
_MOVED: Any = {"marker": "D", "ls": "", "mfc": "#ffffff", "mec": "#000000"}
Timelines = Sequence[report.RequestTimeline]


def panels(timelines: Timelines) -> list[list[report.RequestTimeline]]:
  """The timelines of each fault, by its number."""
  by_fault = itertools.groupby(timelines, key=lambda each: id(each.fault))
  return [list(mine) for _, mine in by_fault]


def _title(fault: report.Event) -> str:
  ranks = "".join(f", rank {rank}" for rank in fault["ranks"])
  return f"{fault['kind']}{ranks}, at {short(fault['t'])} s"


def cells(row: report.RequestTimeline) -> list[Any]:
  """One row of the table, at full precision; None: nothing to tell."""
  tokens = [row.last_before_s, row.first_after_s]
  times = [*tokens, row.paused_s, row.moved_s, row.resumed_s]
  since = [None if t is None else t - row.fault["t"] for t in times]
  affected, is_open = (("no", "yes")[x] for x in (row.affected, row.open))
  return [
    row.request_id, affected, row.rank_before, row.rank_after, *since[:2],
    row.stall_s, row.stall_gaps, is_open, *since[2:],
  ]  # fmt: skip


def _text(value: Any) -> str:
  if value is None:
    return "-"
  return short(value) if isinstance(value, float) else str(value)


def timeline_table(timelines: Timelines) -> str:
  """Markdown for people: a table for each fault."""
  parts = []
  for mine in panels(timelines):
    body = [[_text(value) for value in cells(row)] for row in mine]
    table = grid(HEADER, body, left=(0, 1))
    parts.append(f"### {_title(mine[0].fault)}\n\n{table}\n")
  return "".join([*parts, NOTE])


def timeline_csv(timelines: Timelines) -> str:
  """The same for programs, the faults numbered from 0."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["fault", "fault_s", *HEADER])
  for number, mine in enumerate(panels(timelines)):
    for row in mine:
      writer.writerow([number, row.fault["t"], *cells(row)])
  return text.getvalue()


def _extent(mine: Timelines) -> tuple[float, float]:
  """What of the window holds anything, in seconds from the fault."""
  fault_s, (from_s, until_s) = mine[0].fault["t"], mine[0].window_s
  times = [t for row in mine for t in (fault_s, *row.tokens_s)]
  times += [t for row in mine for t in row.gap_s or ()]
  low, high = max(min(times), from_s), min(max(times), until_s)
  pad = 0.02 * (high - low) or 0.01
  return low - pad - fault_s, high + pad - fault_s


def _label(row: report.RequestTimeline) -> str:
  ranks = dict.fromkeys(map(_text, (row.rank_before, row.rank_after)))
  return f"{row.request_id} ({'→'.join(ranks)})"


def _draw_row(
  axis: Any, row: report.RequestTimeline, y: int, edge: float
) -> None:
  """One request: a dot for each token, a bar for the gap."""
  # Shapes too, for whoever sees no colours.
  colour, marker = style.COLOURS[row.affected], "os"[row.affected]
  fault_s = row.fault["t"]
  if row.gap_s is not None:
    ends = [t - fault_s for t in row.gap_s]
    axis.hlines(y, *ends, color=colour, lw=3, alpha=0.25 + 0.25 * row.affected)
    at_least = ">= " if row.open else ""
    text = f" {at_least}{_text(row.stall_s)} s ({_text(row.stall_gaps)})"
    beside = axis.get_yaxis_transform()
    axis.text(1.01, y, text, va="center", transform=beside)
    if ends[1] > edge:
      axis.plot(edge, y, marker=">", color=colour, ms=3, clip_on=False)
  times = [t - fault_s for t in row.tokens_s]
  axis.plot(times, [y] * len(times), marker, ms=2, color=colour, mew=0)
  if row.moved_s is not None:
    axis.plot(row.moved_s - fault_s, y, ms=3, zorder=5, **_MOVED)


def _draw(axis: Any, mine: Timelines) -> None:
  """The panel of one fault."""
  # The affected, then those that waited longest.
  order = sorted(mine, key=lambda r: (not r.affected, -(r.stall_s or 0.0)))
  rows, (low, high) = order[:SHOWN], _extent(mine)
  for y, row in enumerate(rows):
    _draw_row(axis, row, y, high)
  axis.set_xlim(low, high)
  axis.set_ylim(len(rows) - 0.4, -0.6)
  axis.axvline(0, **FAULT)
  fault_s = rows[0].fault["t"]
  for resumed_s in {r.resumed_s for r in mine if r.resumed_s is not None}:
    axis.axvline(resumed_s - fault_s, color="#000000", lw=0.8, ls="--")
  affected = sum(row.affected for row in rows)
  if 0 < affected < len(rows):
    axis.axhline(affected - 0.5, color="#8a8a8a", lw=0.4)
  axis.set_yticks(range(len(rows)), [_label(row) for row in rows])
  some = f"; {len(rows)} of {len(mine)} requests" * (len(rows) < len(mine))
  axis.set_title(_title(rows[0].fault) + some, loc="left")
  axis.set_title("stall (in usual gaps)", loc="right")


def _handles() -> list[Any]:
  from matplotlib.lines import Line2D

  blue, orange = style.COLOURS[:2]
  looks: dict[str, dict[str, Any]] = {
    "token, affected": {"marker": "s", "color": orange, "ls": "", "ms": 4},
    "token, unaffected": {"marker": "o", "color": blue, "ls": "", "ms": 4},
    "longest gap": {"color": "#8a8a8a", "lw": 3, "alpha": 0.5},
    "fault": FAULT,
    "resumed": {"color": "#000000", "lw": 0.8, "ls": "--"},
    "moved": {"ms": 4, **_MOVED},
  }
  return [Line2D([], [], label=name, **look) for name, look in looks.items()]


def request_figure(
  timelines: Timelines, stem: pathlib.Path
) -> list[pathlib.Path]:
  """Draws a panel a fault, a row a request; writes STEM.png and STEM.pdf."""
  found = panels(timelines)
  heights = [0.45 + 0.14 * min(len(mine), SHOWN) for mine in found]
  with style.context():
    figure = style.figure(style.PAGE_IN, 0.6 + sum(heights))
    axes = figure.subplots(len(found), squeeze=False, height_ratios=heights)
    for axis, mine in zip(axes[:, 0], found, strict=True):
      _draw(axis, mine)
    axes[-1, 0].set_xlabel("time since the fault (s)")
    figure.legend(handles=_handles(), loc="outside lower center", ncols=6)
    return style.save(figure, stem)


def _parse(argv: Sequence[str]) -> tuple[pathlib.Path, float]:
  values = flags.FlagValues()
  flags.DEFINE_string("run", None, "The run's folder.", flag_values=values)
  flags.DEFINE_float("around_s", 1.0, "What to show.", flag_values=values)
  if {"-h", "--help"} & set(argv):
    print(f"{__doc__}\n{values.get_help()}")
    sys.exit()
  try:
    rest = values(list(argv))[1:]
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if rest or not values.run:
    raise ValueError("needed is --run=DIR/SCENARIO/POLICY/seedN, nothing else")
  if not 0 < values.around_s < math.inf:
    raise ValueError(f"--around_s={values.around_s} is no length of time")
  folder = pathlib.Path(values.run).absolute()
  if not (folder / "history.jsonl").is_file():
    raise ValueError(
      f"--run={values.run} holds no history.jsonl; needed is the folder of one"
      " run, DIR/SCENARIO/POLICY/seedN, as experiments.run leaves it"
    )
  return folder, values.around_s


def twin_of(folder: pathlib.Path) -> list[report.Event] | None:
  """The fault-free run with this one's seed, if it is there and it checks."""
  scenario = folder.parent.parent
  for each in (scenario, scenario.parent / TWIN):
    file = each / TWIN / folder.name / "verdict.json"
    verdict = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if verdict.get("overall") in report.VALID:
      return report.read_history(file.with_name("history.jsonl"))
  return None


def show(folder: pathlib.Path, around_s: float) -> list[str]:
  """Writes everything into the folder of a run; the names of the files."""
  report.write_trace(folder, folder / "trace.json")
  events = report.read_history(folder / "history.jsonl", partial_ok=True)
  found = report.request_timelines(events, around_s, twin_of(folder))
  if not found:
    return ["trace.json"]
  write_text(folder / "requests.md", timeline_table(found))
  write_text(folder / "requests.csv", timeline_csv(found))
  drawn = [path.name for path in request_figure(found, folder / "requests")]
  return ["trace.json", "requests.md", "requests.csv", *drawn]


def launch(argv: Sequence[str]) -> int:
  """Does what a command line asks for; the exit status."""
  try:
    folder, around_s = _parse(argv)
    names = show(folder, around_s)
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  none = " (no request was there at a fault)" if len(names) == 1 else ""
  print(f"In {folder}: {', '.join(names)}{none}")
  return 0


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
