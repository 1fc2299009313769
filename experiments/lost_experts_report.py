"""Tables and figures of what losing experts costs."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from resilient_moe.report import lost_experts, style
from resilient_moe.report.latex import escape
from resilient_moe.report.runs import write_text
from resilient_moe.report.table import grid

Stat = tuple[float, float, float]  # value, 95% interval


@dataclasses.dataclass(frozen=True)
class Row:
  """One cell of the comparison; changes are against the whole model."""

  domain: str
  lost: str  # fraction of the experts
  share: float
  which: str  # "" for the whole model
  how: str
  bits: Stat  # per byte
  token_bits: Stat  # per token
  accuracy: Stat
  more_bits: Stat  # per byte, of the same windows
  less_accuracy: Stat  # likewise, negative where it is worse


def _shown(stat: Stat, digits: int = 3) -> str:
  middle, low, high = (f"{x:.{digits}f}" for x in stat)
  return f"{middle} [{low}, {high}]"


def _signed(stat: Stat) -> str:
  middle, low, high = (f"{x:+.3f}" for x in stat)
  return f"{middle} [{low}, {high}]"


def _cells(row: Row, by_token: bool) -> list[str]:
  cells = [row.lost, row.which or "-", row.how or "-", _shown(row.bits)]
  if by_token:
    cells.append(_shown(row.token_bits))
  whole = not row.which
  cells += ["-" if whole else _signed(row.more_bits), _shown(row.accuracy)]
  return [*cells, "-" if whole else _signed(row.less_accuracy)]


def _header(by_token: bool) -> list[str]:
  header = ["lost", "which", "how", "bits per byte"]
  header += ["bits per token"] if by_token else []
  unit = "token" if by_token else "byte"
  return [*header, "change", f"next-{unit} accuracy", "change"]


def to_markdown(rows: Sequence[Row], by_token: bool, notes: str) -> str:
  """A table for each domain, and what the numbers are."""
  parts = []
  for domain in dict.fromkeys(row.domain for row in rows):
    body = [_cells(r, by_token) for r in rows if r.domain == domain]
    table = grid(_header(by_token), body, left=(0, 1, 2))
    parts.append(f"### {domain}\n\n{table}")
  return "\n".join([*parts, notes, ""])


def to_csv(rows: Sequence[Row]) -> str:
  """All numbers at full precision."""
  stats = ("bits", "token_bits", "accuracy", "more_bits", "less_accuracy")
  names = ("domain", "lost", "share", "which", "how")
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  bounds = [f"{n}{end}" for n in stats for end in ("", "_low", "_high")]
  writer.writerow([*names, *bounds])
  for row in rows:
    numbers = [repr(x) for name in stats for x in getattr(row, name)]
    writer.writerow([*(getattr(row, name) for name in names), *numbers])
  return text.getvalue()


def to_latex(rows: Sequence[Row], by_token: bool) -> str:
  """A booktabs `tabular` of the middle values, domains side by side."""
  domains = list(dict.fromkeys(row.domain for row in rows))
  found = {(r.domain, r.lost, r.which, r.how): r for r in rows}
  keys = list(dict.fromkeys((r.lost, r.which, r.how) for r in rows))
  unit = "token" if by_token else "byte"
  lines = [
    r"% \usepackage{booktabs} in the preamble, then \input this file.",
    f"% Bits per byte and next-{unit} accuracy; intervals are in table.csv.",
    r"\begin{tabular}{lll" + "rr" * len(domains) + "}",
    r"\toprule",
  ]
  heads = [rf"\multicolumn{{2}}{{c}}{{{escape(d)}}}" for d in domains]
  lines.append(" & ".join(["", "", "", *heads]) + r" \\")
  lines.append(
    " & ".join(["lost", "which", "how", *["bits", "acc."] * len(domains)])
    + r" \\"
  )
  last = None
  for lost, which, how in keys:
    if lost != last:
      lines.append(r"\midrule")
    cells = [lost if lost != last else "", which or "--", how or "--"]
    for domain in domains:
      row = found[domain, lost, which, how]
      cells += [f"{row.bits[0]:.3f}", f"{row.accuracy[0]:.3f}"]
    lines.append(" & ".join(map(escape, cells)) + r" \\")
    last = lost
  return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def cells_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """The rows as the figure takes them, as `read_csv` gives them back."""
  stats = [field.name for field in dataclasses.fields(Row)][5:]
  found = []
  for row in rows:
    cell = {n: v for n, v in vars(row).items() if n not in stats}
    for name in stats:
      value, low, high = getattr(row, name)
      cell |= {name: value, f"{name}_low": low, f"{name}_high": high}
    found.append(cell)
  return found


def read_csv(file: pathlib.Path) -> list[dict[str, Any]]:
  """The cells of a table.csv that `write` left."""
  text = ("domain", "lost", "which", "how")
  with file.open(encoding="utf-8", newline="") as lines:
    return [
      {k: v if k in text else float(v) for k, v in line.items()}
      for line in csv.DictReader(lines)
    ]


def draw(rows: Sequence[Row], by_token: bool) -> Any:
  """Bits and accuracy over the fraction lost, a column a domain."""
  unit = "token" if by_token else "byte"
  return lost_experts.lost_experts_figure(cells_of(rows), unit)


def write(
  folder: pathlib.Path, rows: Sequence[Row], by_token: bool, notes: str
) -> list[str]:
  """Writes table.md, .csv, .tex and lost_experts.png, .pdf; their names."""
  write_text(folder / "table.md", to_markdown(rows, by_token, notes))
  write_text(folder / "table.csv", to_csv(rows))
  write_text(folder / "table.tex", to_latex(rows, by_token))
  with style.context():
    drawn = style.save(draw(rows, by_token), folder / "lost_experts")
  names = [path.name for path in drawn]
  return ["table.md", "table.csv", "table.tex", *names]
