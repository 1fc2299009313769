"""Tables and figures of what losing experts costs."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.lost_experts_score import HOW
from resilient_moe.report.latex import escape
from resilient_moe.report.runs import write_text
from resilient_moe.report.table import grid

# Okabe and Ito's colours, as in `report/figures.py`.
_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_MARKERS = ("o", "s", "^")
_STYLE: Any = {
  "font.size": 7,
  "axes.linewidth": 0.5,
  "xtick.major.width": 0.5,
  "ytick.major.width": 0.5,
  "pdf.fonttype": 42,
}
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


def draw(rows: Sequence[Row], by_token: bool) -> Any:
  """Bits and accuracy over the fraction lost, a column a domain."""
  import matplotlib
  from matplotlib.figure import Figure

  domains = list(dict.fromkeys(row.domain for row in rows))
  with matplotlib.rc_context(_STYLE):
    figure: Any = Figure(
      figsize=(0.6 + 2.1 * len(domains), 3.6), layout="constrained"
    )
    axes = figure.subplots(
      2, len(domains), sharex=True, sharey="row", squeeze=False
    )
    for column, domain in enumerate(domains):
      mine = [row for row in rows if row.domain == domain]
      for axis, metric in zip(
        axes[:, column], ("bits", "accuracy"), strict=True
      ):
        _panel(axis, mine, metric)
      axes[0, column].set_title(domain, fontsize=7)
      axes[1, column].set_xlabel("experts lost")
    unit = "token" if by_token else "byte"
    axes[0, 0].set_ylabel("bits per byte")
    axes[1, 0].set_ylabel(f"next-{unit} accuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
      handles, labels, loc="outside lower center", ncols=3, frameon=False
    )
  return figure


def _panel(axis: Any, rows: Sequence[Row], metric: str) -> None:
  """One domain and metric; bars are the intervals."""
  whole = next((row for row in rows if not row.which), None)
  shares = sorted({row.share for row in rows if row.which})
  place = {share: i for i, share in enumerate(shares)}
  names = {row.share: row.lost for row in rows}
  if whole is not None:
    value, low, high = getattr(whole, metric)
    axis.axhline(value, color="#8a8a8a", lw=0.6, ls="--", label="none lost")
    axis.axhspan(low, high, color="#8a8a8a", alpha=0.15, lw=0)
  lines = list(dict.fromkeys((r.which, r.how) for r in rows if r.which))
  for number, (which, how) in enumerate(lines):
    mine = [r for r in rows if (r.which, r.how) == (which, how)]
    stats = [getattr(r, metric) for r in mine]
    # Side by side, so that intervals don't hide one another.
    shift = 0.08 * (number - (len(lines) - 1) / 2)
    style = HOW.index(how)
    axis.errorbar(
      [place[r.share] + shift for r in mine],
      [s[0] for s in stats],
      yerr=[[s[0] - s[1] for s in stats], [s[2] - s[0] for s in stats]],
      color=_COLOURS[style],
      marker=_MARKERS[style],
      markersize=2.5,
      markerfacecolor=_COLOURS[style] if which.startswith("most") else "w",
      lw=0.9,
      elinewidth=0.6,
      ls="-" if which.startswith("most") else (0, (4, 1.5)),
      label=f"{which}, {how}",
    )
  axis.set_xticks(range(len(shares)), [names[s] for s in shares])
  for side in ("top", "right"):
    axis.spines[side].set_visible(False)


def write(
  folder: pathlib.Path, rows: Sequence[Row], by_token: bool, notes: str
) -> list[str]:
  """Writes table.md, .csv, .tex and lost_experts.png, .pdf; their names."""
  write_text(folder / "table.md", to_markdown(rows, by_token, notes))
  write_text(folder / "table.csv", to_csv(rows))
  write_text(folder / "table.tex", to_latex(rows, by_token))
  figure = draw(rows, by_token)
  names = []
  for suffix in (".png", ".pdf"):
    path = folder / f"lost_experts{suffix}"
    temporary = path.with_name(f".{path.name}{suffix}")
    figure.savefig(temporary, dpi=200)
    temporary.replace(path)
    names.append(path.name)
  return ["table.md", "table.csv", "table.tex", *names]
