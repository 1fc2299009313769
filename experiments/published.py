"""What papers publish beside the same numbers composed here, with errors.

  python -m experiments.published --config=configs/published.py --workdir=DIR
  python -m experiments.published --config=configs/published.py --workdir=DIR \
      --config.only=eep --config.eep.slots_per_rank=17

Writes published.csv, published.md, published.tex and provenance.json, and
prints the readable one. A row is *predicted* or follows *by construction* from
numbers of the paper (`resilient_moe/sim/published.py` says what that means);
each names its inputs. The plans are those of the policies in `policies/`.
"""

import csv
import inspect
import io
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import launch
from experiments.provenance import provenance
from resilient_moe.report.latex import escape
from resilient_moe.report.runs import write_text
from resilient_moe.report.table import grid
from resilient_moe.sim import (
  published_eep,
  published_rates,
  published_revive,
  published_tarragon,
)
from resilient_moe.sim.published import (
  PREDICTED,
  TARGET,
  Composer,
  Row,
  summary,
)

SYSTEMS: dict[str, Composer] = {
  "revive": published_revive.compose,
  "tarragon": published_tarragon.compose,
  "eep": published_eep.compose,
  "rates": published_rates.compose,
}
COLUMNS = (
  "system", "case", "unit", "published", "simulated", "error", "kind",
  "inputs", "assumes", "note",
)  # fmt: skip


def compose(config: Mapping[str, Any]) -> list[Row]:
  """The rows of the systems that a config asks for.

  Raises:
    ValueError: unknown system or value; names the choices.
  """
  asked = [s for s in str(config["only"]).replace(" ", "").split(",") if s]
  for name in {*asked, *config} - {"only"}:
    if name not in SYSTEMS:
      raise ValueError(
        f"unknown system {name!r}; choices: {', '.join(SYSTEMS)}"
      )
  rows = []
  for name, composer in SYSTEMS.items():
    if asked and name not in asked:
      continue
    values = dict(config.get(name, {}))
    known = inspect.signature(composer).parameters
    for value in values:
      if value not in known:
        raise ValueError(
          f"config.{name}.{value} is unknown; choices: {', '.join(known)}"
        )
    rows += composer(**values)
  return rows


def number(value: float) -> str:
  """Three significant digits, and a unit's prefix where there are many."""
  for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
    if value >= limit:
      return f"{value / limit:.3g} {prefix}"
  return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def _error(row: Row) -> str:
  missed = row.kind == PREDICTED and not row.hit
  return f"{row.error:+.1%}" + (" (missed)" if missed else "")


def to_csv(rows: Sequence[Row]) -> str:
  """Every column, numbers in full."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(COLUMNS)
  for row in rows:
    writer.writerow([getattr(row, name) for name in COLUMNS])
  return text.getvalue()


def _short(row: Row) -> list[str]:
  units = [f"{number(v)}{row.unit if row.unit == 'B' else ''}"
           for v in (row.published, row.simulated)]  # fmt: skip
  unit = "" if row.unit in ("", "B") else f" ({row.unit})"
  return [row.case + unit, *units, _error(row), row.kind]


def verdict(rows: Sequence[Row]) -> str:
  """How good the predictions are, in a sentence."""
  found = summary(list(rows))
  systems = []
  for system in dict.fromkeys(row.system for row in rows):
    mine = [r for r in rows if r.system == system and r.kind == PREDICTED]
    systems.append(f"{system} {sum(r.hit for r in mine)} of {len(mine)}")
  constructed = found["rows"] - found["predicted"]
  return (
    f"Of {found['predicted']:.0f} predicted numbers"
    f" {found['within_target']:.0f} are within {TARGET:.0%}"
    f" ({', '.join(systems)}); the median error is"
    f" {found['median_abs_error']:.0%}, the largest"
    f" {found['max_abs_error']:.0%}. {constructed:.0f} follow by construction"
    " and prove nothing. EEP's recoveries are sums of the stages beside them."
  )


def to_markdown(rows: Sequence[Row]) -> str:
  """A table a system, inputs and notes in it."""
  parts = [f"{verdict(rows)}\n"]
  for system in dict.fromkeys(row.system for row in rows):
    mine = [row for row in rows if row.system == system]
    body = [
      [*_short(row), row.inputs, row.assumes, row.note or "-"] for row in mine
    ]
    header = ["case", "published", "simulated", "error", "kind",
              "inputs from the paper", "assumes", "note"]  # fmt: skip
    table = grid(header, body, left=(0, 4, 5, 6, 7))
    parts.append(f"### {system}\n\n{table}")
  return "\n".join(parts)


def to_latex(rows: Sequence[Row]) -> str:
  """A booktabs `tabular`; needs no other package."""
  header = ["case", "published", "simulated", "error", "kind"]
  lines = [
    r"% \usepackage{booktabs} in the preamble, then \input this file.",
    f"% {escape(verdict(rows))}",
    r"\begin{tabular}{lrrrl}",
    r"\toprule",
    " & ".join(header) + r" \\",
  ]
  system = None
  for row in rows:
    if row.system != system:
      system = row.system
      span = rf"\multicolumn{{5}}{{l}}{{\emph{{{escape(system)}}}}}"
      lines += [r"\midrule", rf"{span} \\"]
    lines.append(" & ".join(map(escape, _short(row))) + r" \\")
  return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def write(rows: Sequence[Row], workdir: pathlib.Path, command: str) -> str:
  """Writes the three tables; the readable one."""
  workdir.mkdir(parents=True, exist_ok=True)
  text = f"# Published numbers\n\n`{command}`\n\n{to_markdown(rows)}"
  write_text(workdir / "published.csv", to_csv(rows))
  write_text(workdir / "published.md", text)
  write_text(workdir / "published.tex", to_latex(rows))
  return text


def main(argv: Sequence[str]) -> int:
  """Does what a command line asks for; the exit status."""
  try:
    config, workdir = launch.parse(argv, "configs/published.py")
    rows = compose(config.to_dict())
    origin = provenance("experiments.published", argv, "simulated", 0)
    print(write(rows, workdir, origin["command"]))
    text = json.dumps(origin, indent=2) + "\n"
    write_text(workdir / "provenance.json", text)
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print(f"In {workdir}: published.md, published.csv, published.tex")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
