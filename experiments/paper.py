"""Every table and figure of a paper, from stored histories and results.

  python -m experiments.paper --config=configs/paper.py --workdir=DIR \
      --config.sources.comparison=runs/quickstart [--config.make=True]

DIR then holds tables/ (LaTeX, booktabs), figures/ (PDF and PNG), paper.tex,
which shows them all, and paper.md and paper.json, which say for each what made
its data: command, commit, runtime, seeds, calibration. Data that is absent is
listed with the command that makes it; `make` runs those commands.

Exit status: 0; 1 where a command failed; 2 for bad input, or if nothing at all
is there (one line on stderr).
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments import launch, paper_artifacts, paper_sources, paper_tex
from experiments.paper_artifacts import Artefact
from experiments.paper_sources import Origin, Source
from experiments.provenance import provenance
from resilient_moe.report.runs import write_text
from resilient_moe.report.table import grid

FAILED, BAD_INPUT = 1, 2


def manifest(
  artefacts: Sequence[Artefact], absent: Sequence[Source], argv: Sequence[str]
) -> dict[str, Any]:
  """What paper.json holds."""
  origins = {a.source.name: _origin(a.source) for a in artefacts}
  return {
    "made_by": provenance("experiments.paper", argv, "simulated", 0)["command"],
    "artefacts": [
      {
        "name": a.name,
        "kind": a.kind.removesuffix("s"),
        "files": list(a.files),
        "source": a.source.name,
        "folder": str(a.source.folder),
        **vars(a.facts),
        **_told(origins[a.source.name]),
      }
      for a in artefacts
    ],
    "absent": [{"source": s.name, "command": s.command} for s in absent],
  }


def _origin(source: Source) -> Origin:
  return paper_sources.origin(source.folder)


def _told(origin: Origin) -> dict[str, Any]:
  command, *earlier = origin.commands or ("",)
  return {
    "command": command,
    "earlier_commands": earlier,
    "commit": origin.commit,
    "dirty": origin.dirty,
    "date": origin.date,
    "device_kind": origin.device_kind,
  }


def to_markdown(made: dict[str, Any]) -> str:
  """The manifest for people."""
  body = [
    [
      ", ".join(a["files"]), a["source"], a["runtime"], a["deployment"] or "-",
      a["seeds"] or "-", a["calibration"] or "-",
    ]
    for a in made["artefacts"]
  ]  # fmt: skip
  header = ["files", "source", "runtime", "deployment", "seeds", "calibration"]
  every = tuple(range(len(header)))
  parts = ["# Tables and figures\n", f"`{made['made_by']}`\n"]
  parts.append(grid(header, body, left=every))
  parts.append("## What made the data\n")
  for source in dict.fromkeys(a["source"] for a in made["artefacts"]):
    a = next(a for a in made["artefacts"] if a["source"] == source)
    state = ", with changes" if a["dirty"] else ""
    when = f" ({a['date']}; commit {a['commit'][:12]}{state})"
    told = when if a["date"] else ""
    parts.append(f"**{source}**, in `{a['folder']}`{told}:\n")
    commands = [a["command"], *a["earlier_commands"]]
    known = [command for command in commands if command]
    parts.append(
      "".join(f"    {command}\n" for command in known)
      or "it has no provenance.json, so nobody knows.\n"
    )
  if made["absent"]:
    parts.append("## Absent\n\nThese commands make it:\n")
    parts += [f"    {each['command']}\n" for each in made["absent"]]
  return "\n".join(parts)


def write(
  workdir: pathlib.Path,
  artefacts: Sequence[Artefact],
  absent: Sequence[Source],
  argv: Sequence[str],
) -> str:
  """Writes paper.json, paper.md and paper.tex; the readable one."""
  made = manifest(artefacts, absent, argv)
  commands = {a["source"]: a["command"] for a in made["artefacts"]}
  text = to_markdown(made)
  write_text(workdir / "paper.json", json.dumps(made, indent=2) + "\n")
  write_text(workdir / "paper.md", text)
  document = paper_tex.document(artefacts, list(commands.items()))
  write_text(workdir / "paper.tex", document)
  return text


def main(argv: Sequence[str]) -> int:
  """Does what a command line asks for; the exit status."""
  try:
    asked = launch.parse(argv, "configs/paper.py")
    sources = paper_sources.read(asked.config, asked.workdir)
    making = bool(asked.config.get("make", False))
    if not making and not any(source.present for source in sources):
      commands = "; ".join(source.command for source in sources)
      raise ValueError(
        f"none of {', '.join(s.name for s in sources)} is there; give folders"
        f" with --config.sources.NAME=DIR, or --config.make=True, or run:"
        f" {commands}"
      )
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  failed = []
  for source in sources if making else ():
    if not source.present and not paper_sources.make(source):
      failed.append(source.name)
  artefacts: list[Artefact] = []
  for source in sources:
    if source.present:
      artefacts += paper_artifacts.make(source, asked.workdir)
  if artefacts:
    absent = [source for source in sources if not source.present]
    print(write(asked.workdir, artefacts, absent, argv))
    print(f"In {asked.workdir}: paper.tex, paper.md, paper.json,")
    print("  tables/ and figures/")
  for name in failed:
    print(f"error: the command of {name} failed", file=sys.stderr)
  return FAILED if failed else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
