"""Tables of a comparison: `table.csv`, `table.md`, `table.tex`.

A row whose verdict is not true prints `invalid` in place of every number and
names the checkers that failed. The CSV has every column at full precision,
NAME_low and NAME_high beside NAME for the interval; the others are for people.
"""

import csv
import io
import json
import pathlib
from collections.abc import Callable, Iterable

from resilient_moe.report.latex import latex
from resilient_moe.report.rows import BASELINE, METRICS, Row, rows_of
from resilient_moe.report.runs import Path, read_runs, write_text

INVALID = "invalid"

# The columns of the readable tables.
SHOWN = (
    "detect_s",
    "plan_s",
    "resume_s",
    "service_stall_s",
    "affected_stall_s",
    "affected_stall_steps",
    "affected_stall_max_s",
    "unaffected_stall_max_s",
    "affected_speedup_vs_restart",
    "redundancy_s",
    "prepare_s",
    "redundancy_bytes",
    "tokens_recomputed",
    "requests_lost",
    "tokens_exact",
)
# Of deployments whose attention and expert ranks are apart.
SHOWN_APART = (
    "healed_s",
    "exchange_bytes",
    "checkpoint_bytes",
    "checkpoint_ratio",
)


def shown(rows: Iterable[Row]) -> tuple[str, ...]:
  """The columns of a readable table of these rows."""
  apart = any(row.deployment == "disaggregated" for row in rows)
  return SHOWN + (SHOWN_APART if apart else ())


def short(value: float) -> str:
  """Three significant digits, without exponents below a million."""
  if value == 0 or float(value).is_integer() and abs(value) < 1e6:
    return f"{value:.0f}"
  if abs(value) >= 1000:
    return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.3g}"
  return f"{value:.3g}"


def _size(value: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if abs(value) < 1024:
      return f"{short(value)} {unit}"
    value /= 1024
  return f"{short(value)} TiB"


def cell(row: Row, column: str) -> str:
  """A number for a reader: median, and [low, high] where seeds differ."""
  if not row.valid:
    return INVALID
  stat = row.stats[column]
  if stat is None:
    return "-"
  show: Callable[[float], str] = _size if column.endswith("_bytes") else short
  middle, low, high = (show(value) for value in stat[:3])
  return middle if low == high else f"{middle} [{low}, {high}]"


def verdict_cell(row: Row) -> str:
  """The verdict, and what failed."""
  failed = f" ({', '.join(row.failed)})" if row.failed else ""
  return row.verdict + failed


def _csv_cells(row: Row) -> list[str]:
  cells = [row.scenario, row.policy, row.runtime, row.deployment]
  cells += [str(row.seeds), row.verdict, "; ".join(row.failed)]
  for name in METRICS:
    stat = row.stats.get(name)
    if not row.valid:
      cells += [INVALID] * 3
    else:
      cells += [repr(v) for v in stat[:3]] if stat else [""] * 3
  for spent in (row.stall_by_action, row.restart_stages):
    cells.append(json.dumps(spent) if row.valid else INVALID)
  return cells


def to_csv(rows: Iterable[Row]) -> str:
  """All columns, at full precision; an empty cell: no such number."""
  header = "scenario policy runtime deployment seeds verdict failed_checkers"
  columns = header.split()
  for name in METRICS:
    columns += [name, f"{name}_low", f"{name}_high"]
  columns += ["stall_by_action_s", "restart_stages_s"]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(columns)
  writer.writerows(_csv_cells(row) for row in rows)
  return text.getvalue()


def grid(
    header: list[str], body: list[list[str]], left: tuple[int, ...] = (0,)
) -> str:
  """An aligned Markdown table; columns flush right but for those `left`."""
  escaped = [[c.replace("|", "\\|") for c in line] for line in [header, *body]]
  widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
  rule = [
      "-" * width if i in left else "-" * (width - 1) + ":"
      for i, width in enumerate(widths)
  ]
  lines = [
      [
          each.ljust(width) if i in left else each.rjust(width)
          for i, (each, width) in enumerate(zip(line, widths, strict=True))
      ]
      for line in [escaped[0], rule, *escaped[1:]]
  ]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _seconds(spent: dict[str, float]) -> str:
  return ", ".join(f"{name} {short(s)}" for name, s in spent.items()) or "-"


def _breakdown(rows: list[Row]) -> str:
  body = [
      [
          row.policy,
          cell(row, "affected_stall_s"),
          _seconds(row.stall_by_action) if row.valid else INVALID,
          _seconds(row.restart_stages) if row.valid else INVALID,
      ]
      for row in rows
      if not row.valid or row.stall_by_action or row.restart_stages
  ]
  if not body:
    return ""
  header = ["policy", "affected_stall_s", "stall by action (s)"]
  return "\nWhere the stall went:\n\n" + grid(
      [*header, "the restart's stages (s)"], body, left=(0, 2, 3)
  )


def _notes(rows: list[Row]) -> str:
  notes = (
      "Seconds (`_s`), bytes, or counts; `_steps`: in fault-free median decode"
      " steps. Median over seeds [interval: the range below 5 seeds, else 95%"
      " bootstrap]. -: nothing to measure."
  )
  if not any(row.policy == BASELINE and row.valid for row in rows):
    notes += f" No speedups: no valid run of `{BASELINE}`."
  for row in rows:
    slos = [row.stats.get(n) for n in ("ttft_slo_s", "tbt_slo_s")]
    if slos[0] and slos[1]:
      notes += (
          f" Goodput (in table.csv): TTFT at most {short(slos[0].median)} s,"
          f" mean TBT at most {short(slos[1].median)} s."
      )
      break
  for timing in dict.fromkeys(t for row in rows for t in row.timing):
    notes += (
        f" Simulated, in virtual time; {timing}. Tokens are hashes, so of a"
        " lossy policy `tokens_exact` says nothing."
    )
  return notes


def to_markdown(rows: Iterable[Row]) -> str:
  """The readable columns, a scenario at a time, with the stall's breakdown."""
  rows = list(rows)
  parts = []
  for scenario in dict.fromkeys(row.scenario for row in rows):
    mine = [row for row in rows if row.scenario == scenario]
    kinds = sorted({f"{row.runtime}, {row.deployment}" for row in mine})
    columns = shown(mine)
    header = ["policy", "runtime", "seeds", "verdict", *columns]
    body = [
        [row.policy, row.runtime, str(row.seeds), verdict_cell(row)]
        + [cell(row, name) for name in columns]
        for row in mine
    ]
    parts.append(
        f"### {scenario} ({'; '.join(kinds)})\n\n{grid(header, body)}"
        f"{_breakdown(mine)}\n{_notes(mine)}\n"
    )
  return "\n".join(parts)


def write_tables(folder: Path, **slo: float) -> list[Row]:
  """Writes table.csv, table.md and table.tex over the runs in a directory.

  Args:
    folder: the work directory, DIR/<scenario>/<policy>/seed<seed>/.
    **slo: `ttft_slo_s`, `tbt_slo_s` as in `measure`.
  """
  rows = rows_of(read_runs(folder), **slo)
  if not rows:
    raise ValueError(
        f"{folder} holds no runs; expected <scenario>/<policy>/seed<seed>/"
    )
  place = pathlib.Path(folder)
  write_text(place / "table.csv", to_csv(rows))
  write_text(place / "table.md", to_markdown(rows))
  write_text(place / "table.tex", latex(rows, shown(rows), cell, verdict_cell))
  return rows
