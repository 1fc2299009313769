"""Figures of a comparison. matplotlib is loaded only when one is drawn."""

import pathlib
from typing import Any

import numpy as np

from resilient_moe.report import curves as curves_lib
from resilient_moe.report import runs as runs_lib
from resilient_moe.report.curves import Curve

# Okabe and Ito's colours, which the colour-blind can tell apart; the yellow
# is left out, which is too pale for a line.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 0.6)))
# Greys and hatches, so that a bar is never taken for a policy's colour.
_BARS: dict[str, tuple[str, str]] = {
    curves_lib.DECIDE: ("#000000", ""),
    "mesh, programs": ("#ffffff", ""),
    "experts": ("#ffffff", "//////"),
    "requests": ("#9a9a9a", ""),
    "restart, launch": ("#dddddd", "....."),
    curves_lib.OTHER: ("#ffffff", "xxxxxx"),
}
_MARKERS = {
    "plan ready": "v",
    "first token of a paused request": "o",
    "redundancy restored": "D",
}
_FAULT = "#B00020"
_STYLE: Any = {
    "font.size": 7,
    "axes.linewidth": 0.5,
    "hatch.linewidth": 0.4,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "pdf.fonttype": 42,  # text stays text, as publishers ask for
}
_BINS = 120


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
    row = (-0.38 if span.repair else -0.2) * top
    # A tenth of a millimetre at least, or short actions would vanish.
    width = max(span.seconds, (stop - start) / 600)
    axis.broken_barh(
        [(span.start_s, width)],
        (row, 0.15 * top),
        facecolor=colour,
        hatch=hatch,
        edgecolor="#000000",
        linewidth=0.4,
    )


def _draw_stages(axis: Any, curve: Curve) -> None:
  for fault_s in curve.faults_s:
    axis.axvline(fault_s, color=_FAULT, linewidth=0.8)
  for name, time_s in curve.stages:
    axis.plot(
        time_s,
        0,
        marker=_MARKERS[name],
        markersize=4,
        markerfacecolor="#ffffff",
        markeredgecolor="#000000",
        markeredgewidth=0.7,
        zorder=5,
    )


def _draw(
    axis: Any,
    curve: Curve,
    quiet: Curve | None,
    style: tuple[str, Any],
    window: tuple[float, float],
    top: float,
) -> None:
  """One policy in one window."""
  axis.set_xlim(*window)
  axis.set_ylim(-0.45 * top, 1.15 * top)
  axis.axhline(0, color="#000000", linewidth=0.4)
  for side in ("top", "right"):
    axis.spines[side].set_visible(False)
  if curve.failed:
    text = f"invalid ({', '.join(curve.failed)})"
    axis.text(0.5, 0.6, text, ha="center", transform=axis.transAxes)
    return
  edges = _edges(window, curve.step_s)
  if quiet is not None:
    axis.stairs(quiet.rate(edges), edges, color="#8a8a8a", lw=0.5, ls="--")
  colour, dashes = style
  rate = curve.rate(edges)
  axis.stairs(rate, edges, fill=True, color=colour, alpha=0.2, lw=0)
  axis.stairs(rate, edges, color=colour, lw=1.0, ls=dashes, baseline=None)
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
      Line2D([], [], color=_FAULT, lw=0.8, label="fault"),
      Line2D([], [], color="#8a8a8a", lw=0.5, ls="--", label="fault-free run"),
  ]
  handles += [
      Line2D(
          [], [], ls="", marker=m, mfc="#ffffff", mec="#000000", ms=4, label=n
      )
      for n, m in _MARKERS.items()
      if n in stages
  ]
  handles += [
      Patch(facecolor=c, hatch=h, edgecolor="#000000", lw=0.4, label=n)
      for n, (c, h) in _BARS.items()
      if n in kinds
  ]
  figure.legend(
      handles=handles, loc="outside lower center", ncols=5, frameon=False
  )


def _figure(curves: list[Curve], twins: list[Curve | None], title: str) -> Any:
  """A row of panels for each policy; a close-up to the left if needed."""
  from matplotlib.figure import Figure

  windows = curves_lib.windows(curves)
  size = (7.0, 0.95 + 0.62 * len(curves))
  figure: Any = Figure(figsize=size, layout="constrained")
  figure.get_layout_engine().set(h_pad=0.01, hspace=0.02)
  axes = figure.subplots(
      len(curves), len(windows), sharex="col", sharey=True, squeeze=False
  )
  shown = [c for c in curves if not c.failed]
  rates = [c.rate(_edges(w, c.step_s)) for c in shown for w in windows]
  top = max((float(rate.max()) for rate in rates), default=1.0) or 1.0
  for row, (curve, quiet) in enumerate(zip(curves, twins, strict=True)):
    colour = _COLOURS[row % len(_COLOURS)]
    style = colour, _DASHES[row % len(_DASHES)]
    for axis, window in zip(axes[row], windows, strict=True):
      _draw(axis, curve, quiet, style, window, top)
    label = axes[row][0]
    label.set_ylabel(curve.policy, rotation=0, ha="right", va="center")
    label.yaxis.set_major_locator(_ticks())
    label.set_ylim(-0.45 * top, 1.15 * top)
  for axis in axes[-1]:
    axis.set_xlabel("seconds since the fault")
  axes[0][0].set_title(f"{title}: tokens per second", loc="left", fontsize=7)
  if len(windows) > 1:
    axes[0][1].set_title("the same runs, for longer", loc="left", fontsize=7)
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
  """The fault-free run on the time axis of `run`."""
  twin = runs_lib.find(runs, run, runs_lib.TWIN)
  if twin is None or not twin.valid:
    return None
  fault = next(e["t"] for e in run.events if e["event"] == "fault")
  times, tokens = curves_lib.cumulative(twin.events, fault)
  return Curve(twin.policy, (), times, tokens, (), (), (), 0.0, 0.0)


def _save(figure: Any, stem: pathlib.Path) -> list[pathlib.Path]:
  paths = []
  for suffix in (".png", ".pdf"):
    path = stem.with_name(stem.name + suffix)
    temporary = path.with_name(f".{path.name}{suffix}")
    figure.savefig(temporary, dpi=200)
    temporary.replace(path)
    paths.append(path)
  return paths


def timeline(folder: runs_lib.Path) -> list[pathlib.Path]:
  """Draws tokens per second around the fault, one line a policy.

  Args:
    folder: the work directory. The first scenario (by name) with a fault gives
      `timeline.png` and `.pdf`, further ones `timeline-<scenario>`. Of each
      policy the lowest seed is drawn; a run that doesn't check says so.

  Returns:
    The files written; none if there was no fault.
  """
  import matplotlib

  runs = runs_lib.read_runs(folder)
  paths: list[pathlib.Path] = []
  for scenario in sorted({run.scenario for run in runs}):
    firsts: dict[str, runs_lib.Run] = {}
    for run in sorted(runs, key=lambda r: (len(r.seed), r.seed)):
      if run.scenario == scenario and run.policy != runs_lib.TWIN:
        firsts.setdefault(run.policy, run)
    pairs = [(r, curves_lib.curve(r)) for _, r in sorted(firsts.items())]
    drawn = [(run, curve) for run, curve in pairs if curve is not None]
    if drawn:
      name = f"timeline-{scenario}" if paths else "timeline"
      with matplotlib.rc_context(_STYLE):
        figure = _figure(
            [curve for _, curve in drawn],
            [_twin_curve(runs, run) for run, _ in drawn],
            scenario,
        )
        paths += _save(figure, pathlib.Path(folder) / name)
  return paths
