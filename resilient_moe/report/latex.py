"""The LaTeX table: a booktabs `tabular` for a paper to input."""

from collections.abc import Callable, Sequence

from resilient_moe.report.rows import Row

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}

_HEAD = r"""% \usepackage{booktabs} in the preamble, then \input this file.
% Seconds (_s), bytes or counts; _steps: fault-free median decode steps.
% Median over seeds [interval]; --: nothing to measure.
"""


def escape(text: str) -> str:
  """Text in which LaTeX sees no commands."""
  return "".join(_ESCAPES.get(character, character) for character in text)


def heading(name: str) -> str:
  """A column name on several lines, broken at underscores: they are long."""
  words = name.split("_")
  lines = [f"{word}_" for word in words[:-1]] + [words[-1]]
  # A unit alone on a line reads badly.
  if len(lines) > 1 and len(lines[-1]) <= 2:
    lines[-2:] = ["".join(lines[-2:])]
  text = r" \\ ".join(map(escape, lines))
  return rf"\shortstack{{{text}}}"


def cell(text: str) -> str:
  """A table's cell, as LaTeX."""
  # The interval goes below its median, so that the table fits a page; the
  # median is what stands on the row's line.
  text = "--" if text == "-" else escape(text)
  median, bracket, interval = text.partition(" [")
  if not bracket:
    return text
  stack = rf"\shortstack{{{median} \\ {{[{interval}}}}}"
  return rf"\raisebox{{-1.2em}}{{{stack}}}"


def tabular(
    align: str,
    header: Sequence[str],
    groups: Sequence[Sequence[Sequence[str]]],
) -> str:
  """A booktabs `tabular` of LaTeX cells, a rule between two groups of rows."""
  for line in (header, *(line for group in groups for line in group)):
    if len(line) != len(align):
      raise ValueError(f"{len(line)} cells for {len(align)} columns: {line}")
  lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
  lines.append(" & ".join(header) + r" \\")
  for group in groups:
    lines.append(r"\midrule")
    lines += [" & ".join(line) + r" \\" for line in group]
  return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex(
    rows: Sequence[Row],
    columns: Sequence[str],
    shown: Callable[[Row, str], str],
    verdict_cell: Callable[[Row], str],
) -> str:
  """The rows as a `tabular`; needs the package booktabs and no other."""
  names = ["policy", "runtime", "deployment", "seeds", *columns, "verdict"]
  lines = [r"\begin{tabular}{lll" + "r" * (len(columns) + 1) + "l}"]
  lines += [r"\toprule", " & ".join(map(heading, names)) + r" \\"]
  scenario = None
  for row in rows:
    if row.scenario != scenario:
      scenario = row.scenario
      span = rf"\multicolumn{{{len(names)}}}{{l}}"
      lines += [r"\midrule", rf"{span}{{\emph{{{escape(scenario)}}}}} \\"]
    first = [row.policy, row.runtime, row.deployment, str(row.seeds)]
    numbers = [cell(shown(row, name)) for name in columns]
    cells = [*map(escape, first), *numbers, escape(verdict_cell(row))]
    lines.append(" & ".join(cells) + r" \\")
  lines += [r"\bottomrule", r"\end{tabular}", ""]
  return _HEAD + "\n".join(lines)
