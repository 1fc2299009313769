"""One look for every figure, readable in print and by the colour-blind.

A column is 3.3 inches wide and text is 8 points, so that figures go into a
paper as they are. Whatever tells two things apart does so twice: by one of
Okabe and Ito's colours and by dashes, a marker or a hatch. Figures have no
titles, a paper's captions say what they show. matplotlib is loaded only when
one is drawn.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

COLUMN_IN = 3.3  # width of a column of text, inches
PAGE_IN = 7.0  # of both, with the gap between them
FONT_PT = 8

BLACK, GREY, PALE, WHITE = "#000000", "#767676", "#dddddd", "#ffffff"
# Okabe and Ito's colours; their yellow is too pale for a line.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, SKY, ORANGE = "#CC79A7", "#56B4E9", "#E69F00"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK)
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 0.8)),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")

# These look the same in all figures of a paper, whoever else is in them.
KNOWN = (
    "restart_cached",
    "kv_restore",
    "mesh_shrink",
    "replica_promotion",
    "mask_experts",
    "spare",
    "retry",
    "restart",
    "cheapest",
    "tarragon",
    "eep",
    "revive_moe",
    "role_switch",
    "kv_restore_host",
    "not_ready",
)

_RC: Any = {
    "axes.labelsize": FONT_PT,
    "axes.linewidth": 0.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": FONT_PT,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
    "font.size": FONT_PT,
    "hatch.linewidth": 0.4,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.2,
    "legend.fontsize": FONT_PT,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.labelspacing": 0.3,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # text stays text, as publishers ask for
    "ps.fonttype": 42,
    "xtick.labelsize": FONT_PT,
    "xtick.major.width": 0.5,
    "ytick.labelsize": FONT_PT,
    "ytick.major.width": 0.5,
}


@dataclasses.dataclass(frozen=True)
class Style:
  """How one of several things looks."""

  colour: str
  dashes: Any
  marker: str

  def line(self) -> dict[str, Any]:
    """Arguments of `Axes.plot`."""
    return {
        "color": self.colour,
        "linestyle": self.dashes,
        "marker": self.marker,
    }

  def points(self) -> dict[str, Any]:
    """Arguments of `Axes.plot` or `Axes.errorbar`, without a line."""
    return {"color": self.colour, "linestyle": "", "marker": self.marker}


def _numbered(number: int) -> Style:
  """With dashes the first 28 differ, with markers the first 70."""
  turn, colour = divmod(number, len(COLOURS))
  return Style(
      COLOURS[colour],
      DASHES[(colour + turn) % len(DASHES)],
      MARKERS[number % len(MARKERS)],
  )


def styles(names: Iterable[str]) -> dict[str, Style]:
  """A style for each name; those of `KNOWN` always get the same one.

  A label such as `spare_4`, which is no policy's name, counts as its own.
  """
  found: dict[str, Style] = {}
  free = len(KNOWN)
  for name in sorted(set(names)):
    if name in KNOWN:
      found[name] = _numbered(KNOWN.index(name))
    else:
      found[name] = _numbered(free)
      free += 1
  return found


def context() -> contextlib.AbstractContextManager[None]:
  """The settings under which a figure must be made and saved."""
  import matplotlib

  manager: contextlib.AbstractContextManager[None]
  manager = matplotlib.rc_context(_RC)
  return manager


def figure(width_in: float, height_in: float) -> Any:
  """An empty figure; make it, fill it and save it within `context`."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width_in, height_in), layout="constrained")


def letters(axes: Sequence[Any]) -> None:
  """(a), (b), ... above the panels, for a caption to speak of."""
  for number, axis in enumerate(axes):
    axis.set_title(f"({chr(ord('a') + number)})", loc="left")


def save(drawn: Any, stem: pathlib.Path) -> list[pathlib.Path]:
  """Writes STEM.png and STEM.pdf, each whole or not at all; their paths.

  The same figure gives the same bytes: no date is written.
  """
  paths = []
  # Laid out once, for both files: that takes most of the time.
  drawn.draw_without_rendering()
  drawn.set_layout_engine("none")
  for suffix in (".png", ".pdf"):
    path = stem.with_name(stem.name + suffix)
    temporary = path.with_name(f".{path.name}{suffix}")
    dated: dict[str, Any] = {"CreationDate": None} if suffix == ".pdf" else {}
    drawn.savefig(temporary, dpi=200, metadata=dated)
    temporary.replace(path)
    paths.append(path)
  return paths
