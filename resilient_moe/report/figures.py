"""Figures of a comparison. matplotlib is loaded only when one is drawn."""

import pathlib
from typing import Any

import numpy as np

from resilient_moe.report import curves as curves_lib
from resilient_moe.report import runs as runs_lib
from resilient_moe.report import style
from resilient_moe.report.curves import Curve
from resilient_moe.report.history import of_kind

# Greys and hatches, so that a bar is never taken for a policy's colour.
_BARS: dict[str, tuple[str, str]] = {
    curves_lib.DECIDE: (style.BLACK, ""),
    "mesh, programs": (style.WHITE, ""),
    "experts": (style.WHITE, "//////"),
    "requests": (style.GREY, ""),
    "restart, launch": (style.PALE, "....."),
    curves_lib.OTHER: (style.WHITE, "xxxxxx"),
}
_MARKERS = {
    "plan ready": "v",
    "first token of a paused request": "o",
    "redundancy restored": "D",
}
FAULT: Any = {"color": style.BLACK, "lw": 1.0, "ls": (0, (1, 1))}
_QUIET: Any = {"color": style.GREY, "lw": 0.8, "ls": "--"}
_MARK: Any = {
    "linestyle": "",
    "markersize": 4.5,
    "markerfacecolor": style.WHITE,
    "markeredgecolor": style.BLACK,
    "markeredgewidth": 0.8,
}
_BINS = 120
_LOW, _HIGH = -0.5, 1.15  # of the y axis, in highest rates


def _edges(window: tuple[float, float], step_s: float) -> np.ndarray:
  """Bins of a step or a few, with an edge at the fault."""
  start, stop = window
  width = max(step_s, (stop - start) / _BINS)
  before, after = (int(np.ceil(abs(x) / width)) for x in window)
  return np.arange(-before, after + 1) * width


def _draw_spans(axis: Any, curve: Curve, top: float) -> None:
  """Actions as bars under the curve: resume above, repair below."""
  start, stop = axis.get_xlim()
  for span in curve.spans:
    colour, hatch = _BARS[span.kind]
    row = (-0.42 if span.repair else -0.22) * top
    # A tenth of a millimetre at least, or short actions would vanish.
    width = max(span.seconds, (stop - start) / 600)
    axis.broken_barh(
        [(span.start_s, width)],
        (row, 0.17 * top),
        facecolor=colour,
        hatch=hatch,
        edgecolor=style.BLACK,
        linewidth=0.4,
    )


def _draw_stages(axis: Any, curve: Curve) -> None:
  for fault_s in curve.faults_s:
    axis.axvline(fault_s, **FAULT)
  for name, time_s in curve.stages:
    axis.plot(time_s, 0, marker=_MARKERS[name], zorder=5, **_MARK)


def _draw(
    axis: Any,
    curve: Curve,
    quiet: Curve | None,
    look: style.Style,
    window: tuple[float, float],
    top: float,
) -> None:
  """One policy in one window."""
  axis.set_xlim(*window)
  axis.set_ylim(_LOW * top, _HIGH * top)
  axis.axhline(0, color=style.BLACK, linewidth=0.4)
  if curve.failed:
    text = f"invalid ({', '.join(curve.failed)})"
    axis.text(0.5, 0.6, text, ha="center", transform=axis.transAxes)
    return
  edges = _edges(window, curve.step_s)
  if quiet is not None:
    axis.stairs(quiet.rate(edges), edges, **_QUIET)
  colour, rate = look.colour, curve.rate(edges)
  axis.stairs(rate, edges, fill=True, color=colour, alpha=0.2, lw=0)
  axis.stairs(rate, edges, color=colour, ls=look.dashes, baseline=None)
  _draw_spans(axis, curve, top)
  _draw_stages(axis, curve)


def _legend(figure: Any, curves: list[Curve]) -> None:
  """What the marks mean; only those that occur."""
  from matplotlib.lines import Line2D
  from matplotlib.patches import Patch

  valid = [curve for curve in curves if not curve.failed]
  stages = {name for curve in valid for name, _ in curve.stages}
  kinds = {span.kind for curve in valid for span in curve.spans}
  handles: list[Any] = [
      Line2D([], [], label="fault", **FAULT),
      Line2D([], [], label="fault-free run", **_QUIET),
  ]
  handles += [
      Line2D([], [], marker=marker, label=name, **_MARK)
      for name, marker in _MARKERS.items()
      if name in stages
  ]
  handles += [
      Patch(facecolor=c, hatch=h, edgecolor=style.BLACK, lw=0.4, label=n)
      for n, (c, h) in _BARS.items()
      if n in kinds
  ]
  figure.legend(handles=handles, loc="outside lower center", ncols=4)


def _panels(curves: list[Curve], twins: list[Curve | None]) -> Any:
  """A row of panels for each policy; a close-up to the left if needed."""
  windows = curves_lib.windows(curves)
  figure = style.figure(style.PAGE_IN, 1.1 + 0.62 * len(curves))
  figure.get_layout_engine().set(h_pad=0.01, hspace=0.02)
  axes = figure.subplots(
      len(curves), len(windows), sharex="col", sharey=True, squeeze=False
  )
  looks = style.styles(curve.policy for curve in curves)
  shown = [c for c in curves if not c.failed]
  rates = [c.rate(_edges(w, c.step_s)) for c in shown for w in windows]
  top = max((float(rate.max()) for rate in rates), default=1.0) or 1.0
  for row, (curve, quiet) in enumerate(zip(curves, twins, strict=True)):
    for axis, window in zip(axes[row], windows, strict=True):
      _draw(axis, curve, quiet, looks[curve.policy], window, top)
    label = axes[row][0]
    label.set_ylabel(curve.policy, rotation=0, ha="right", va="center")
    label.yaxis.set_major_locator(_ticks())
    label.set_ylim(_LOW * top, _HIGH * top)
  scales = ("time since the fault (s), close-up", "time since the fault (s)")
  for axis, text in zip(axes[-1], scales[-len(windows) :], strict=True):
    axis.set_xlabel(text)
  figure.supylabel("tokens per second", fontsize=style.FONT_PT)
  _legend(figure, curves)
  return figure


def _ticks() -> Any:
  from matplotlib.ticker import MaxNLocator

  class Positive(MaxNLocator):
    """No ticks beside the bars, where there are no tokens to count."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
      ticks = np.asarray(super().tick_values(max(vmin, 0.0), vmax))
      return ticks[ticks >= 0]

  return Positive(2)


def _twin_curve(runs: list[runs_lib.Run], run: runs_lib.Run) -> Curve | None:
  """The fault-free run on the time axis of `run`.

  Its clock says something else, because a policy prepares for longer or not:
  the last step before the fault is where both are put together.
  """
  twin = runs_lib.find(runs, run, runs_lib.TWIN)
  if twin is None or not twin.valid:
    return None
  fault_s = next(e["t"] for e in run.events if e["event"] == "fault")
  steps = [e for e in of_kind(run.events, "step") if e["t"] <= fault_s]
  if not steps:
    return None
  last = steps[-1]
  same = [e for e in of_kind(twin.events, "step") if e["step"] == last["step"]]
  if not same:
    return None
  zero_s = same[0]["t"] + fault_s - last["t"]
  times, tokens = curves_lib.cumulative(twin.events, zero_s)
  return Curve(twin.policy, (), times, tokens, (), (), (), 0.0, 0.0)


def timeline_figure(runs: list[runs_lib.Run], scenario: str) -> Any:
  """Tokens per second around a scenario's fault, a row of panels a policy.

  Of each policy the lowest seed is drawn; a run that doesn't check says so.
  None if there was no fault. To be called, and saved, in `style.context`.
  """
  firsts: dict[str, runs_lib.Run] = {}
  for run in sorted(runs, key=lambda r: (len(r.seed), r.seed)):
    if run.scenario == scenario and run.policy != runs_lib.TWIN:
      firsts.setdefault(run.policy, run)
  pairs = [(r, curves_lib.curve(r)) for _, r in sorted(firsts.items())]
  drawn = [(run, curve) for run, curve in pairs if curve is not None]
  if not drawn:
    return None
  twins = [_twin_curve(runs, run) for run, _ in drawn]
  return _panels([curve for _, curve in drawn], twins)


def timeline(folder: runs_lib.Path) -> list[pathlib.Path]:
  """Draws tokens per second around the fault, one line a policy.

  Args:
    folder: the work directory. The first scenario (by name) with a fault gives
      `timeline.png` and `.pdf`, further ones `timeline-<scenario>`.

  Returns:
    The files written; none if there was no fault.
  """
  runs = runs_lib.read_runs(folder)
  paths: list[pathlib.Path] = []
  for scenario in sorted({run.scenario for run in runs}):
    with style.context():
      figure = timeline_figure(runs, scenario)
      if figure is not None:
        name = f"timeline-{scenario}" if paths else "timeline"
        paths += style.save(figure, pathlib.Path(folder) / name)
  return paths
