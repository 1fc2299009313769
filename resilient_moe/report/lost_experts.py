"""The figure of what losing experts costs in quality."""

from collections.abc import Mapping, Sequence
from typing import Any

from resilient_moe.report import style

Cells = Sequence[Mapping[str, Any]]

HOW = ("masked", "dropped", "nearest")
WORST = "most used"  # the experts whose loss costs most
_LOOKS = dict(zip(HOW, (style.BLUE, style.VERMILION, style.GREEN), strict=True))
_MARKERS = dict(zip(HOW, ("o", "s", "^"), strict=True))
METRICS = {"bits": "bits per byte", "accuracy": "next-{unit} accuracy"}


def lost_experts_figure(cells: Cells, unit: str = "byte") -> Any:
  """Quality over the fraction of experts lost, a column of panels a domain.

  Args:
    cells: mappings with `domain`, `lost` (the fraction as text), `share` (as a
      number), `which`, `how` (both empty for the whole model), and for each of
      `bits`, `accuracy` NAME, NAME_low, NAME_high.
    unit: `byte` or `token`, what the next one of is predicted.

  Returns:
    The figure, None if there are no cells. To be called, and saved, in
    `style.context`.
  """
  domains = list(dict.fromkeys(cell["domain"] for cell in cells))
  if not domains:
    return None
  wide = min(style.PAGE_IN, max(style.COLUMN_IN, 0.7 + 2.1 * len(domains)))
  figure = style.figure(wide, 4.0)
  axes = figure.subplots(
      2, len(domains), sharex=True, sharey="row", squeeze=False
  )
  for column, domain in enumerate(domains):
    mine = [cell for cell in cells if cell["domain"] == domain]
    for axis, metric in zip(axes[:, column], METRICS, strict=True):
      _panel(axis, mine, metric)
    # What the panels are of: columns of a table, rather than a title.
    axes[0, column].set_title(domain)
    axes[1, column].set_xlabel("experts lost (fraction)")
  for axis, label in zip(axes[:, 0], METRICS.values(), strict=True):
    axis.set_ylabel(label.format(unit=unit))
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(
      handles, labels, loc="outside lower center", ncols=2 if wide < 5 else 3
  )
  return figure


def _panel(axis: Any, cells: Cells, metric: str) -> None:
  """One domain and metric; bars are the intervals."""
  for cell in cells:
    if not cell["which"]:
      axis.axhline(
          cell[metric], color=style.GREY, lw=0.8, ls=(0, (1, 1)),
          label="none lost",
      )  # fmt: skip
  gone = [cell for cell in cells if cell["which"]]
  shares = sorted({cell["share"] for cell in gone})
  names = {cell["share"]: cell["lost"] for cell in gone}
  lines = list(dict.fromkeys((c["which"], c["how"]) for c in gone))
  for number, (which, how) in enumerate(lines):
    mine = [c for c in gone if (c["which"], c["how"]) == (which, how)]
    # Side by side, so that intervals don't hide one another.
    shift = 0.09 * (number - (len(lines) - 1) / 2)
    worst = which == WORST
    axis.errorbar(
        [shares.index(c["share"]) + shift for c in mine],
        [c[metric] for c in mine],
        [
            [c[metric] - c[f"{metric}_low"] for c in mine],
            [c[f"{metric}_high"] - c[metric] for c in mine],
        ],
        color=_LOOKS[how],
        marker=_MARKERS[how],
        markersize=3,
        markerfacecolor=_LOOKS[how] if worst else style.WHITE,
        lw=0.9,
        elinewidth=0.6,
        ls="-" if worst else (0, (4, 1.5)),
        label=f"{which}, {how}",
    )
  axis.set_xticks(range(len(shares)), [names[share] for share in shares])
