"""paper.tex: every table and figure, with captions, to be compiled."""

from collections.abc import Sequence

from experiments.paper_artifacts import FIGURES, Artefact
from resilient_moe.report.latex import escape

# A short one, so that what is measured can be cited at once.
_REFERENCES = (
  ("revivemoe", "ReviveMoE. arXiv 2602.21140, 2026."),
  ("tarragon", "Tarragon. arXiv 2601.01310, 2026."),
  (
    "eep",
    "Surviving Partial Rank Failures in Wide Expert-Parallel MoE Inference."
    " arXiv 2605.10670, 2026.",
  ),
)

_HEAD = r"""% Made by experiments.paper; compile in this folder with pdflatex.
\documentclass[10pt]{article}
\usepackage[utf8]{inputenc}
% As wide as two columns of 3.3 inches, which the figures are made for.
\usepackage[textwidth=7in,textheight=9.5in]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\setlength{\belowcaptionskip}{4pt}
\begin{document}
\sloppy
\title{Recovery policies compared: tables and figures}
\author{resilient\_moe}
\maketitle
Policies are after ReviveMoE~\cite{revivemoe}, Tarragon~\cite{tarragon} and
EEP~\cite{eep}. Each caption says where its data comes from; the commands are
in the last section.
"""


def caption(artefact: Artefact) -> str:
  """A caption, and what its data is; LaTeX."""
  facts = artefact.facts
  parts = [f"{facts.runtime} runtime" if facts.deployment else facts.runtime]
  parts += [facts.deployment, f"seeds {facts.seeds}" if facts.seeds else ""]
  parts.append(facts.calibration)
  data = "; ".join(part for part in parts if part)
  return escape(f"{artefact.caption} Data: {artefact.source.name} ({data}).")


def _float(artefact: Artefact) -> str:
  """One table or figure."""
  figure = artefact.kind == FIGURES
  kind = "figure" if figure else "table"
  if figure:
    (file,) = (name for name in artefact.files if name.endswith(".pdf"))
    inside = rf"\includegraphics{{{file}}}"
    inner = [rf"\centering{inside}", rf"\caption{{{caption(artefact)}}}"]
  else:
    (file,) = artefact.files
    size = r"\footnotesize"
    if artefact.tall:
      size = r"\scriptsize\renewcommand{\arraystretch}{0.9}"
    inner = [
      rf"\caption{{{caption(artefact)}}}",
      rf"\centering{size}",
      r"\setlength{\tabcolsep}{3.5pt}",
      rf"\input{{{file}}}",
    ]
  label = f"{'fig' if figure else 'tab'}:{artefact.name}".replace("_", "-")
  inner.append(rf"\label{{{label}}}")
  return "\n".join(
    [rf"\begin{{{kind}}}[!htbp]", *inner, rf"\end{{{kind}}}"]
  )


def document(
  artefacts: Sequence[Artefact], commands: Sequence[tuple[str, str]]
) -> str:
  """The whole of paper.tex.

  Args:
    artefacts: what it shows, a section a source.
    commands: name and command of each source.
  """
  parts = [_HEAD]
  for source in dict.fromkeys(a.source.name for a in artefacts):
    mine = [_float(a) for a in artefacts if a.source.name == source]
    parts.append(rf"\section{{{escape(source)}}}")
    parts += [escape(a.notes) for a in artefacts if a.source.name == source]
    # Floats of a source stay together, and never too many wait.
    parts += [*mine, r"\clearpage"]
  parts.append(r"\section{Where the data comes from}")
  parts.append(r"\begin{description}\footnotesize\raggedright")
  parts += [
    rf"\item[{escape(name)}] \texttt{{{_breakable(command)}}}"
    for name, command in commands
  ]
  parts.append(r"\end{description}")
  parts.append(r"\begin{thebibliography}{9}")
  parts += [rf"\bibitem{{{key}}} {escape(text)}" for key, text in _REFERENCES]
  parts += [r"\end{thebibliography}", r"\end{document}", ""]
  return "\n".join(parts)


def _breakable(command: str) -> str:
  """A command that may be broken at commas, slashes and equals signs too."""
  text = escape(command)
  for mark in ",/=.":
    text = text.replace(mark, mark + r"\allowbreak{}")
  # Two hyphens would be set as a dash.
  return text.replace("--", "-{}-")
