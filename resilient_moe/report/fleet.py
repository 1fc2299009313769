"""Figures of a fleet study, from its samples: stall by scale, redundancy.

A sample is what one policy did with one seed on so many devices, a mapping
with `policy`, `devices`, `seed` and the columns that are drawn.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resilient_moe.report import style

Samples = Sequence[Mapping[str, Any]]
LEAST = 1e-7  # of a part of the time; below it seeds can't tell


def _by_policy(samples: Samples, column: str) -> dict[str, dict[int, Any]]:
  """Policy -> devices -> the column's values over seeds, [.]."""
  found: dict[str, dict[int, list[float]]] = collections.defaultdict(dict)
  for sample in samples:
    if sample.get(column) is not None:
      by_devices = found[sample["policy"]]
      by_devices.setdefault(sample["devices"], []).append(sample[column])
  return {
      policy: {d: np.array(v) for d, v in sorted(by.items())}
      for policy, by in sorted(found.items())
  }


def _legend(figure: Any, axis: Any, columns: int) -> None:
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _rows(policies: int, columns: int) -> float:
  """Height of a legend, inches."""
  return 0.16 * -(-policies // columns)


def stall_scale_figure(samples: Samples) -> Any:
  """Stall of a stopped request against devices: (a) median, (b) 99th centile.

  Median over seeds, the range shaded. None if nothing was stopped. To be
  called, and saved, in `style.context`.
  """
  columns = ("stall_p50_s", "stall_p99_s")
  found = [_by_policy(samples, column) for column in columns]
  names = sorted({name for each in found for name in each})
  if not names:
    return None
  figure = style.figure(style.PAGE_IN, 2.3 + _rows(len(names), 5))
  axes = figure.subplots(1, 2, sharey=True)
  looks = style.styles(names)
  for axis, by_policy in zip(axes, found, strict=True):
    for policy, by in by_policy.items():
      devices, values = list(by), list(by.values())
      middle = [float(np.median(v)) for v in values]
      axis.plot(devices, middle, label=policy, **looks[policy].line())
      axis.fill_between(
          devices,
          [float(v.min()) for v in values],
          [float(v.max()) for v in values],
          color=looks[policy].colour,
          alpha=0.15,
          lw=0,
      )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _plain_ticks(axis, sorted({d for by in by_policy.values() for d in by}))
    axis.set_xlabel("devices")
  axes[0].set_ylabel("stall of a stopped request (s)")
  style.letters(axes)
  _legend(figure, axes[0], 5)
  return figure


def _plain_ticks(axis: Any, devices: Sequence[int]) -> None:
  """The numbers that were run, and no powers of two."""
  axis.set_xticks(devices, [f"{d:,}" for d in devices])
  axis.minorticks_off()


def redundancy_figure(samples: Samples) -> Any:
  """What redundancy takes against what it gives, at the largest scale.

  (a) time without full service, (b) load that misses its objective, against
  the device memory that redundancy fills. Median over seeds, bars: their range;
  dashed: policies of which no other costs less and loses less. To be called,
  and saved, in `style.context`.
  """
  if not samples:
    return None
  largest = max(sample["devices"] for sample in samples)
  mine = [s for s in samples if s["devices"] == largest]
  looks = style.styles(sample["policy"] for sample in mine)
  figure = style.figure(style.PAGE_IN, 2.5 + _rows(len(looks), 5))
  axes = figure.subplots(1, 2)
  labels = (
      "time degraded or out",
      "missed load",
  )
  for axis, column, label in zip(
      axes, ("full", "goodput_fraction"), labels, strict=True
  ):
    _trade(axis, mine, column, looks)
    axis.set_ylabel(f"{label} (fraction)")
    axis.set_xlabel("device memory that redundancy fills (%)")
  style.letters(axes)
  _legend(figure, axes[0], 5)
  return figure


def _trade(
    axis: Any, samples: Samples, column: str, looks: dict[str, style.Style]
) -> None:
  """One point a policy, and the front of those that nobody beats."""
  cost, given = (_by_policy(samples, c) for c in ("redundancy_memory", column))
  points = []
  for policy, by in given.items():
    (values,) = by.values()
    x = 100 * float(np.median(*cost[policy].values()))
    lacks = np.maximum(1 - values, LEAST)
    y = float(np.median(lacks))
    points.append((x, y))
    axis.errorbar(
        [x],
        [y],
        [[y - float(lacks.min())], [float(lacks.max()) - y]],
        label=policy,
        capsize=2,
        elinewidth=0.7,
        **looks[policy].points(),
    )
  front = pareto(points)
  axis.plot(*zip(*front, strict=True), color=style.GREY, ls="--", zorder=0)
  axis.set_yscale("log")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Of (cost, loss) pairs, those that no other is better than in both."""
  front: list[tuple[float, float]] = []
  for cost, loss in sorted(points):
    if not front or loss < front[-1][1]:
      front.append((cost, loss))
  return front
