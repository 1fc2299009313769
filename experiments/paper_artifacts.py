"""The tables and figures of each kind of work directory."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import fleet_table, lost_experts_report
from experiments.paper_sources import Source
from resilient_moe import report
from resilient_moe.report import breakdown, fleet, latex, lost_experts, style
from resilient_moe.report.rows import Row
from resilient_moe.report.runs import TWIN, Run, write_text
from resilient_moe.report.table import cell, short

FIGURES, TABLES = "figures", "tables"
_TALL = 50  # lines

# Of a comparison: column, and how a paper heads it.
COLUMNS = {
  "detect_s": r"detected \\ (s)",
  "affected_stall_s": r"stall, lost \\ rank (s)",
  "affected_stall_steps": r"in median \\ steps",
  "unaffected_stall_max_s": r"longest of \\ others (s)",
  "affected_speedup_vs_restart": r"speed-up over \\ restart",
  "redundancy_bytes": r"redundancy",
  "tokens_recomputed": r"tokens \\ recomputed",
  "requests_lost": r"requests \\ lost",
  "tokens_exact": r"answers \\ exact",
}
FLEET_COLUMNS = {
  "full": r"full \\ service",
  "goodput_fraction": r"goodput \\ (part)",
  "stall_p50_s": r"stall, \\ p50 (s)",
  "stall_p99_s": r"stall, \\ p99 (s)",
  "requests_lost": r"requests \\ lost",
  "redundancy_memory": r"memory \\ filled (part)",
  "throughput_cost": r"capacity \\ taken (part)",
}


@dataclasses.dataclass(frozen=True)
class Facts:
  """What the data of an artefact is."""

  runtime: str
  deployment: str = ""
  seeds: str = ""
  calibration: str = ""


@dataclasses.dataclass(frozen=True)
class Artefact:
  """A table or figure, written."""

  name: str
  kind: str  # FIGURES or TABLES
  files: tuple[str, ...]  # from the work directory
  caption: str  # plain text
  wide: bool  # over both columns of a page
  source: Source
  facts: Facts
  notes: str = ""  # too long for a caption
  tall: bool = False  # a table that fills a page


@dataclasses.dataclass(frozen=True)
class _Out:
  """Writes artefacts of one source."""

  workdir: pathlib.Path
  source: Source

  def table(
    self, name: str, text: str, caption: str, facts: Facts, notes: str = ""
  ) -> Artefact:
    file = f"{TABLES}/{self.source.name}-{name}.tex"
    write_text(self.workdir / file, text)
    made = self._made(name, TABLES, (file,), caption, True, facts)
    tall = text.count("\n") > _TALL
    return dataclasses.replace(made, notes=notes, tall=tall)

  def figure(
    self, name: str, drawn: Any, caption: str, facts: Facts
  ) -> Artefact:
    """To be called in `style.context`."""
    stem = self.workdir / FIGURES / f"{self.source.name}-{name}"
    files = tuple(f"{FIGURES}/{p.name}" for p in style.save(drawn, stem))
    wide = bool(drawn.get_figwidth() > style.COLUMN_IN + 0.1)
    return self._made(name, FIGURES, files, caption, wide, facts)

  def _made(
    self, name: str, kind: str, files: tuple[str, ...], caption: str,
    wide: bool, facts: Facts,
  ) -> Artefact:  # fmt: skip
    full = f"{self.source.name}-{name}"
    return Artefact(full, kind, files, caption, wide, self.source, facts)


def make(source: Source, workdir: pathlib.Path) -> list[Artefact]:
  """Writes everything that a source's data gives."""
  for folder in (FIGURES, TABLES):
    (workdir / folder).mkdir(parents=True, exist_ok=True)
  with style.context():
    return list(_MAKERS[source.module](_Out(workdir, source)))


def _several(values: Sequence[Any]) -> str:
  return ", ".join(str(value) for value in dict.fromkeys(values))


def _facts(runs: Sequence[Run]) -> Facts:
  known = [run.run for run in runs if run.run]
  return Facts(
    _several([event["runtime"] for event in known]),
    _several([event["deployment"] for event in known]),
    _several(sorted(run.seed for run in runs)),
    _several([event["timing"] for event in known if "timing" in event]),
  )


def _of_runs(out: _Out) -> Iterator[Artefact]:
  """A comparison: for each scenario with faults, all policies."""
  folder = out.source.folder
  file = folder / "config.json"
  slo = json.loads(file.read_text("utf-8")).get("slo") if file.is_file() else {}
  runs = report.read_runs(folder)
  rows = report.rows_of(runs, **(slo or {}))
  for name in sorted({run.scenario for run in runs}):
    mine = [row for row in rows if row.scenario == name]
    if all(row.policy == TWIN for row in mine):
      continue
    facts = _facts([run for run in runs if run.scenario == name])
    yield out.table(
      name, _comparison(mine),
      f"Policies under the same faults ({name}) and requests. Median over "
      "seeds, their interval below. An invalid row is one whose history does "
      "not check.", facts,
    )  # fmt: skip
    figure = report.timeline_figure(runs, name)
    if figure is not None:
      yield out.figure(
        f"{name}-timeline", figure,
        f"Tokens per second around the fault ({name}), a row a policy, the "
        "lowest seed; below the line what recovery does, above: until the "
        "paused requests go on, below: behind traffic.", facts,
      )  # fmt: skip
    figure = report.breakdown_figure(mine)
    if figure is not None:
      about = f"Where the stall of a request of the lost rank went ({name})"
      yield out.figure(
        f"{name}-breakdown", figure,
        f"{about}: median over seeds, action by action; a restart by its own "
        "stages.", facts,
      )  # fmt: skip
      yield out.table(
        f"{name}-breakdown", _breakdown(mine), f"{about}, in milliseconds.",
        facts,
      )  # fmt: skip


def _head(text: str) -> str:
  return rf"\shortstack{{{text}}}"


def _comparison(rows: Sequence[Row]) -> str:
  """A row a policy; columns that nobody has a number for are left out.

  Simulated tokens are hashes: whether they are exact says nothing.
  """
  measured = [row for row in rows if row.runtime != "simulated"]
  shown = {
    name: head
    for name, head in COLUMNS.items()
    if any(
      row.valid and row.stats.get(name) is not None
      for row in (measured if name == "tokens_exact" else rows)
    )
  }
  body = [
    [
      latex.escape(row.policy),
      *(latex.cell(cell(row, name)) for name in shown),
      latex.escape(row.verdict),
    ]
    for row in rows
  ]
  header = ["policy", *map(_head, shown.values()), "verdict"]
  return latex.tabular("l" + "r" * len(shown) + "l", header, [body])


def _breakdown(rows: Sequence[Row]) -> str:
  """A row a policy, a column a kind of action."""
  bars = {row.policy: breakdown.parts(row) for row in rows}
  bars = {name: bar for name, bar in bars.items() if bar}
  kinds = [
    kind for kind in breakdown.KINDS
    if any(part.kind == kind for bar in bars.values() for part in bar)
  ]  # fmt: skip
  body = []
  for name, bar in bars.items():
    spent = [sum(p.seconds for p in bar if p.kind == kind) for kind in kinds]
    numbers = [short(1e3 * s) if s else "--" for s in (*spent, sum(spent))]
    body.append([latex.escape(name), *numbers])
  heads = [_head(latex.escape(k).replace(", ", r", \\ ")) for k in kinds]
  align = "l" + "r" * (len(kinds) + 1)
  return latex.tabular(align, ["policy", *heads, "all"], [body])


def _of_fleet(out: _Out) -> Iterator[Artefact]:
  """A fleet study: by scale, and what redundancy is worth."""
  folder = out.source.folder
  lines = (folder / "samples.jsonl").read_text("utf-8").splitlines()
  samples = [json.loads(line) for line in lines]
  settings = json.loads((folder / "config.json").read_text("utf-8"))
  rows = fleet_table.rows(samples, settings.get("cheapest_of", ()))
  notes = fleet_table.notes(settings)
  facts = Facts(
    "simulated",
    "disaggregated" if settings.get("attention") else "collocated",
    _several(sorted({sample["seed"] for sample in samples})),
    f"cost model: {settings['model']} on {settings['device']}, by its data "
    "sheet",
  )
  groups = [
    [
      [
        latex.escape(row.policy), f"{row.devices:,}",
        *(latex.cell(fleet_table.cell(row, name)) for name in FLEET_COLUMNS),
      ]
      for row in rows if row.devices == devices
    ]
    for devices in dict.fromkeys(row.devices for row in rows)
  ]  # fmt: skip
  header = ["policy", "devices", *map(_head, FLEET_COLUMNS.values())]
  align = "l" + "r" * (len(header) - 1)
  yield out.table(
    "table", latex.tabular(align, header, groups),
    f"Policies on a fleet in groups of {settings['ranks']} ranks, "
    f"{settings['days']:g} days, failures {settings['rate']}. Median over "
    "seeds, their interval below.", facts, notes,
  )  # fmt: skip
  figure = fleet.stall_scale_figure(samples)
  if figure is not None:
    yield out.figure(
      "stall-scale", figure,
      "Stall of a stopped request against the size of the fleet: (a) median, "
      "(b) 99th percentile; median over seeds, their range shaded.", facts,
    )  # fmt: skip
  figure = fleet.redundancy_figure(samples)
  if figure is not None:
    yield out.figure(
      "redundancy-availability", figure,
      "What redundancy takes against what it gives on "
      f"{max(s['devices'] for s in samples):,} devices: (a) time without full "
      "service, (b) load that misses its objective. Dashed: policies that no "
      "other beats in both.", facts,
    )  # fmt: skip


def _of_lost_experts(out: _Out) -> Iterator[Artefact]:
  folder = out.source.folder
  text = (folder / "table.tex").read_text("utf-8")
  unit = "token" if "next-token" in text else "byte"
  facts = Facts("no serving: held-out text is scored")
  about = (
    "Quality with experts lost in every layer, the most used ones of the very "
    "text or every n-th: the gate takes the next best (masked), they add "
    "nothing (dropped), or the nearest live one by weights answers (nearest)."
  )
  yield out.table("quality", text, about, facts)
  cells = lost_experts_report.read_csv(folder / "table.csv")
  figure = lost_experts.lost_experts_figure(cells, unit)
  if figure is not None:
    ends = " Bars: 95% bootstrap intervals over documents."
    yield out.figure("quality", figure, about + ends, facts)


def _of_published(out: _Out) -> Iterator[Artefact]:
  folder = out.source.folder
  with (folder / "published.csv").open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
  predicted = [row for row in rows if row["kind"] == "predicted"]
  yield out.table(
    "numbers", (folder / "published.tex").read_text("utf-8"),
    f"Published numbers beside the same composed by the simulator. "
    f"{len(predicted)} are predicted; the other {len(rows) - len(predicted)} "
    "follow by construction from numbers of the same paper and prove nothing.",
    Facts("simulated", calibration="inputs of the papers, data sheets"),
  )  # fmt: skip


_MAKERS: dict[str, Callable[[_Out], Iterator[Artefact]]] = {
  "experiments.run": _of_runs,
  "experiments.fleet": _of_fleet,
  "experiments.lost_experts": _of_lost_experts,
  "experiments.published": _of_published,
}
