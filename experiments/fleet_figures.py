"""Figures of the fleet study: stall against scale, redundancy's worth."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colours, which the colour-blind can tell apart, and markers.
_COLOURS = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
_MARKERS = "osD^vP*X"
_STYLE: Any = {
  "font.size": 7,
  "axes.linewidth": 0.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "pdf.fonttype": 42,  # text stays text, as publishers ask for
}

Samples = Sequence[Mapping[str, Any]]


def draw(samples: Samples, folder: pathlib.Path) -> list[pathlib.Path]:
  """Draws both figures; none where there are no samples."""
  if not samples:
    return []
  import matplotlib

  with matplotlib.rc_context(_STYLE):
    paths = _save(stall_scale(samples), folder / "stall_scale")
    figure = redundancy_availability(samples)
    return paths + _save(figure, folder / "redundancy_availability")


def _figure(columns: int) -> tuple[Any, Any]:
  from matplotlib.figure import Figure

  figure: Any = Figure(figsize=(3.5 * columns, 2.6), layout="constrained")
  return figure, figure.subplots(1, columns, squeeze=False)[0]


def _styles(samples: Samples) -> dict[str, dict[str, Any]]:
  """A colour and a marker for each policy, the same in both figures."""
  names = sorted({sample["policy"] for sample in samples})
  return {
    name: {
      "color": _COLOURS[i % len(_COLOURS)],
      "marker": _MARKERS[i % len(_MARKERS)],
      "markersize": 4,
      "linewidth": 1,
    }
    for i, name in enumerate(names)
  }


def _by_policy(samples: Samples, column: str) -> dict[str, dict[int, Any]]:
  """Policy -> devices -> the column's values over seeds, [.]."""
  found: dict[str, dict[int, list[float]]] = collections.defaultdict(dict)
  for sample in samples:
    if sample[column] is not None:
      by_devices = found[sample["policy"]]
      by_devices.setdefault(sample["devices"], []).append(sample[column])
  return {
    policy: {d: np.array(v) for d, v in by.items()}
    for policy, by in found.items()
  }


def stall_scale(samples: Samples) -> Any:
  """Stall of a stopped request against devices: median and 99th percentile."""
  figure, axes = _figure(2)
  styles = _styles(samples)
  for axis, column in zip(axes, ("stall_p50_s", "stall_p99_s"), strict=True):
    for policy, by in sorted(_by_policy(samples, column).items()):
      devices = np.array(sorted(by))
      middle = np.array([np.median(by[d]) for d in devices])
      low = np.array([by[d].min() for d in devices])
      high = np.array([by[d].max() for d in devices])
      axis.plot(devices, middle, label=policy, **styles[policy])
      axis.fill_between(
        devices, low, high, color=styles[policy]["color"], alpha=0.15, lw=0
      )
    axis.set_xscale("log", base=2)
    axis.set_xticks(devices, [f"{d:,}" for d in devices], minor=False)
    _plain_log(axis)
    axis.set_xlabel("devices")
    axis.set_title(
      f"stall of a stopped request, {column.split('_')[1]} (s)",
      loc="left", fontsize=7,
    )  # fmt: skip
  _legend(figure, axes[0])
  return figure


def redundancy_availability(samples: Samples) -> Any:
  """Memory of redundancy against what it gives, at the largest scale.

  The line joins policies of which no other costs less and gives more.
  """
  largest = max(sample["devices"] for sample in samples)
  samples = [s for s in samples if s["devices"] == largest]
  figure, axes = _figure(2)
  styles = _styles(samples)
  for axis, column, title in zip(
    axes,
    ("full", "goodput_fraction"),
    ("time without full service", "load that misses its objective"),
    strict=True,
  ):
    cost = _by_policy(samples, "redundancy_memory")
    given = _by_policy(samples, column)
    points = {
      p: (float(np.median(cost[p][largest])), given[p][largest])
      for p in sorted(given)
    }
    for policy, (x, values) in points.items():
      lacks = np.maximum(1 - values, 1e-7)
      y = float(np.median(lacks))
      axis.errorbar(
        [100 * x], [y], [[y - lacks.min()], [lacks.max() - y]],
        label=policy, capsize=2, linestyle="", elinewidth=0.7,
        color=styles[policy]["color"], marker=styles[policy]["marker"],
        markersize=4,
      )  # fmt: skip
    front = pareto(
      [(x, float(np.median(1 - v))) for x, v in points.values()]
    )
    axis.plot(
      [100 * x for x, _ in front], [max(y, 1e-7) for _, y in front],
      color="#8a8a8a", lw=0.7, ls="--", zorder=0,
    )  # fmt: skip
    _plain_log(axis)
    axis.set_xlabel("device memory that redundancy fills (%)")
    axis.set_title(f"{title}, {largest} devices", loc="left", fontsize=7)
  _legend(figure, axes[0])
  return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Of (cost, loss) pairs, those that no other is better than in both."""
  front: list[tuple[float, float]] = []
  for cost, loss in sorted(points):
    if not front or loss < front[-1][1]:
      front.append((cost, loss))
  return front


def _plain_log(axis: Any) -> None:
  """A logarithmic y axis with numbers at decades only: they are slow to set."""
  from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

  axis.set_yscale("log")
  axis.yaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=True))
  axis.yaxis.set_minor_formatter(NullFormatter())
  axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, axis: Any) -> None:
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=5, frameon=False
  )


def _save(figure: Any, stem: pathlib.Path) -> list[pathlib.Path]:
  paths = []
  figure.draw_without_rendering()
  figure.set_layout_engine("none")  # as laid out now, in both files
  for suffix in (".png", ".pdf"):
    path = stem.with_name(stem.name + suffix)
    figure.savefig(path, dpi=200)
    paths.append(path)
  return paths
