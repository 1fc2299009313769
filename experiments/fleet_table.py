"""The fleet study's table: a row for each policy and number of devices."""

import collections
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from resilient_moe.report.latex import escape, heading
from resilient_moe.report.rows import Stat, stat
from resilient_moe.report.table import grid, short
from resilient_moe.sim.arrivals import attribution
from resilient_moe.sim.failure_rates import LLAMA3_CAUSES, RATES

CHEAPEST = "cheapest"
COLUMNS = (
  "full", "degraded", "zero", "capacity", "goodput_fraction",
  "goodput_per_device", "goodput_vs_best_fixed", "stall_p50_s", "stall_p99_s",
  "pause_p50_s", "pause_p99_s", "ttft_p99_s",
  "requests_refused", "requests_lost", "tokens_lost", "tokens_recomputed",
  "failures", "abandoned", "fallbacks", "planned_restarts", "outages",
  "redundancy_device_bytes", "redundancy_host_bytes", "redundancy_memory",
  "spare_devices", "throughput_cost",
)  # fmt: skip
SHOWN = (
  "full", "zero", "capacity", "goodput_fraction", "goodput_vs_best_fixed",
  "stall_p50_s", "stall_p99_s", "pause_p50_s", "ttft_p99_s", "requests_lost",
  "tokens_recomputed", "fallbacks", "planned_restarts",
  "redundancy_memory", "redundancy_host_bytes", "throughput_cost",
)  # fmt: skip
_PARTS = (
  "full", "degraded", "zero", "capacity", "goodput_fraction",
  "redundancy_memory",
  "throughput_cost",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """One policy at one scale."""

  policy: str
  devices: int
  seeds: int
  stats: dict[str, Stat | None]


def read_samples(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Every finished cell's numbers, in order."""
  files = sorted(workdir.glob("*/devices*/seed*/sample.json"))
  found = [json.loads(file.read_text("utf-8")) for file in files]
  return sorted(found, key=lambda s: (s["devices"], s["policy"], s["seed"]))


def rows(
  samples: Sequence[Mapping[str, Any]], fixed: Sequence[str] = ()
) -> list[Row]:
  """Medians over seeds with intervals.

  `goodput_vs_best_fixed`: goodput over that of the policy that would have been
  best in hindsight, of the `fixed` ones (else of all but `cheapest`): the one
  with the highest mean over the same seeds at the same scale.
  """
  by_row = collections.defaultdict(list)
  for sample in samples:
    by_row[sample["devices"], sample["policy"]].append(sample)
  found = []
  for (devices, policy), mine in by_row.items():
    best = _best_fixed(samples, devices, {s["seed"] for s in mine}, fixed)
    columns: dict[str, list[float | None]] = {}
    for name in COLUMNS:
      columns[name] = [sample.get(name) for sample in mine]
    columns["goodput_vs_best_fixed"] = [
      s["goodput_tokens_per_s"] / best[s["seed"]] if s["seed"] in best else None
      for s in mine
    ]
    stats = {name: stat(values) for name, values in columns.items()}
    found.append(Row(policy, devices, len(mine), stats))
  return found


def _best_fixed(
  samples: Sequence[Mapping[str, Any]],
  devices: int,
  seeds: set[int],
  fixed: Sequence[str],
) -> dict[int, float]:
  """Goodput by seed of the best fixed policy in hindsight."""
  by_policy: dict[str, dict[int, float]] = {}
  for s in samples:
    chosen = s["policy"] in fixed if fixed else s["policy"] != CHEAPEST
    if s["devices"] == devices and s["seed"] in seeds and chosen:
      goods = by_policy.setdefault(s["policy"], {})
      goods[s["seed"]] = s["goodput_tokens_per_s"]
  whole = [goods for goods in by_policy.values() if len(goods) == len(seeds)]
  return max(whole, key=lambda g: sum(g.values()), default={})


def cell(row: Row, column: str) -> str:
  """A number for a reader."""
  found = row.stats[column]
  if found is None:
    return "-"
  show = _bytes if column.endswith("_bytes") else short
  if column in _PARTS or column.endswith("_fixed"):
    show = _part
  middle, low, high = (show(value) for value in found[:3])
  return middle if low == high else f"{middle} [{low}, {high}]"


def _part(value: float) -> str:
  return f"{value:.5f}"


def _bytes(value: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if abs(value) < 1000:
      return f"{short(value)} {unit}"
    value /= 1000
  return f"{short(value)} TB"


def notes(settings: Mapping[str, Any]) -> str:
  """What the numbers are made of."""
  rate = RATES[settings["rate"]]
  trace = settings["traces"] or f"drawn; {attribution()}"
  causes = sum(n for _, n in LLAMA3_CAUSES.values())
  return (
    f"Simulated: {settings['model']} on {settings['device']} by the cost "
    f"model, {settings['ranks']} ranks a group, {settings['days']:g} days. "
    f"Failures `{rate.name}` times {settings['multiplier']:g}: {rate.source}; "
    f"by domain as Llama 3's {causes} interruptions. Load "
    f"{settings['utilisation']:g} of a bare group's capacity, trace "
    f"{settings['trace']} ({trace}). Goodput: first token within "
    f"{settings['ttft_slo_s']:g} s, mean gap at most "
    f"{settings['tbt_slo_s']:g} s. full, degraded, zero: parts of the time of "
    "all groups; capacity: its mean over the healthy one. Stalls are of "
    "failures, pauses as planned (a rank joins, a restart brings devices "
    "back), both weighted by the requests that they stop. "
    "redundancy_memory: part of the device memory that it fills; "
    "throughput_cost: capacity a device that it takes. "
    "Median over seeds [interval: the range below 5 seeds, else 95% bootstrap]."
  )


def to_markdown(table: Sequence[Row], note: str) -> str:
  """The readable columns."""
  header = ["policy", "devices", "seeds", *SHOWN]
  body = [
    [r.policy, str(r.devices), str(r.seeds), *(cell(r, c) for c in SHOWN)]
    for r in table
  ]
  return f"### Fleet\n\n{grid(header, body)}\n{note}\n"


def to_csv(table: Sequence[Row]) -> str:
  """All columns, at full precision; NAME_low and NAME_high beside NAME."""
  header = ["policy", "devices", "seeds"]
  for name in COLUMNS:
    header += [name, f"{name}_low", f"{name}_high"]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(header)
  for row in table:
    cells: list[str] = [row.policy, str(row.devices), str(row.seeds)]
    for name in COLUMNS:
      found = row.stats[name]
      cells += [repr(v) for v in found[:3]] if found else [""] * 3
    writer.writerow(cells)
  return text.getvalue()


def to_latex(table: Sequence[Row]) -> str:
  """A `tabular`; needs the package booktabs and no other."""
  header = ["policy", "devices", "seeds", *SHOWN]
  lines = [
    "% \\usepackage{booktabs} in the preamble, then \\input this file.",
    rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
    rf"\toprule {' & '.join(map(heading, header))} \\",
  ]
  devices = None
  for row in table:
    if row.devices != devices:
      devices = row.devices
      lines.append(r"\midrule")
    cells = [row.policy, str(row.devices), str(row.seeds)]
    shown = [escape(each) for each in cells]
    for column in SHOWN:
      text = cell(row, column)
      middle, bracket, interval = text.partition(" [")
      shown.append(
        rf"\shortstack{{{escape(middle)} \\ {{[{escape(interval)}}}}}"
        if bracket
        else "--" if text == "-" else escape(text)
      )
    lines.append(" & ".join(shown) + r" \\")
  return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
