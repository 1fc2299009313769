"""Where the stall of each policy went, action by action: stacked bars."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from resilient_moe.report import curves as curves_lib
from resilient_moe.report import phases as phases_lib
from resilient_moe.report import style
from resilient_moe.report.rows import Row

RESTART = "RestartInstance"
REST = "restart, other"

# What the time was spent on, by colour; which action it was, by hatch.
KINDS = {
    curves_lib.DECIDE: style.BLACK,
    "mesh, programs": style.SKY,
    "experts": style.GREEN,
    "requests": style.ORANGE,
    "restart, launch": style.PURPLE,
    "steps": style.PALE,
    curves_lib.OTHER: style.WHITE,
}
_HATCHES = ("", "////", "...", "xxx", "---", "|||", "++++")
_LESS_THAN = 1 / 4  # of the longest bar: such are drawn on a scale of their own
_VISIBLE = 1 / 400  # of the scale: what is shorter has no place in a legend


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a bar."""

  name: str
  kind: str
  seconds: float


def parts(row: Row) -> tuple[Part, ...]:
  """A row's median affected stall in pieces, in the order of time.

  An instance's restart is broken down into its own stages. What they add up
  to beyond the restart's seconds is taken from the steps that follow, which
  is where the last of them happens.
  """
  found = []
  spent = dict(row.stall_by_action)
  stages = dict(row.restart_stages) if RESTART in spent else {}
  if stages:
    rest = spent[RESTART] - sum(stages.values())
    stages[REST] = max(rest, 0.0)
    left = spent.get(phases_lib.REMAINDER, 0.0) + min(rest, 0.0)
    spent[phases_lib.REMAINDER] = max(left, 0.0)
  for name, seconds in spent.items():
    if name == RESTART and stages:
      found += [Part(n, "restart, launch", s) for n, s in stages.items()]
    else:
      found.append(Part(name, _kind(name), seconds))
  return tuple(found)


def _kind(name: str) -> str:
  if name == phases_lib.BEFORE:
    return curves_lib.DECIDE
  if name == phases_lib.REMAINDER:
    return "steps"
  return curves_lib.KINDS.get(name, curves_lib.OTHER)


def _looks(bars: Sequence[tuple[Part, ...]]) -> dict[str, tuple[str, str]]:
  """By name, a colour and a hatch that no other of that colour has."""
  names: dict[str, list[str]] = {}
  for part in (part for bar in bars for part in bar):
    mine = names.setdefault(part.kind, [])
    if part.name not in mine:
      mine.append(part.name)
  return {
      name: (KINDS[kind], _HATCHES[number % len(_HATCHES)])
      for kind in KINDS
      for number, name in enumerate(names.get(kind, ()))
  }


def _total(bar: tuple[Part, ...]) -> float:
  return sum(part.seconds for part in bar)


def scales(bars: dict[str, tuple[Part, ...]]) -> list[list[str]]:
  """Policies that share a scale: the quick ones, then those that take long.

  A restart takes so much longer that beside it the others would be dots.
  """
  longest = max(map(_total, bars.values()))
  quick = [n for n, b in bars.items() if _total(b) < _LESS_THAN * longest]
  slow = [n for n in bars if n not in quick]
  return [group for group in (quick, slow) if group]


def _panel(
    axis: Any,
    names: Sequence[str],
    bars: dict[str, tuple[Part, ...]],
    looks: dict[str, tuple[str, str]],
) -> None:
  """A bar for each name, its seconds at its end."""
  top = max(_total(bars[name]) for name in names)
  unit, factor = ("ms", 1e3) if top < 1 else ("s", 1.0)
  for y, name in enumerate(names):
    left = 0.0
    for part in bars[name]:
      colour, hatch = looks[part.name]
      width = factor * part.seconds
      axis.barh(
          y, width, 0.7, left, facecolor=colour, hatch=hatch,
          edgecolor=style.BLACK, linewidth=0.4,
      )  # fmt: skip
      left += width
    axis.text(left + 0.015 * factor * top, y, f"{left:.3g}", va="center")
  axis.set_xlim(0, 1.15 * factor * top)
  axis.set_ylim(len(names) - 0.5, -0.5)
  axis.set_yticks(range(len(names)), names)
  axis.tick_params(axis="y", length=0)
  axis.set_xlabel(f"stall of a request of the lost rank ({unit})")


def _legend(
    figure: Any,
    groups: Sequence[Sequence[str]],
    bars: dict[str, tuple[Part, ...]],
    looks: dict[str, tuple[str, str]],
) -> None:
  """The pieces that can be seen."""
  from matplotlib.patches import Patch

  seen = set()
  for group in groups:
    top = max(_total(bars[name]) for name in group)
    pieces = [part for name in group for part in bars[name]]
    seen |= {p.name for p in pieces if p.seconds > _VISIBLE * top}
  handles = [
      Patch(facecolor=c, hatch=h, edgecolor=style.BLACK, lw=0.4, label=name)
      for name, (c, h) in looks.items()
      if name in seen
  ]
  figure.legend(handles=handles, loc="outside lower center", ncols=2)


def breakdown_figure(rows: Sequence[Row]) -> Any:
  """Stacked bars, one a policy: rows of one scenario.

  Invalid rows are left out, and those that nothing stopped. None if no row is
  left. To be called, and saved, in `style.context`.
  """
  bars = {row.policy: parts(row) for row in rows if row.stall_by_action}
  bars = {name: bar for name, bar in bars.items() if _total(bar) > 0}
  if not bars:
    return None
  groups = scales(bars)
  looks = _looks(list(bars.values()))
  heights = [0.42 + 0.19 * len(group) for group in groups]
  figure = style.figure(style.COLUMN_IN, sum(heights) + 1.35)
  axes = figure.subplots(len(groups), squeeze=False, height_ratios=heights)
  for axis, group in zip(axes[:, 0], groups, strict=True):
    _panel(axis, group, bars, looks)
  _legend(figure, groups, bars, looks)
  return figure
