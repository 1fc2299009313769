"""Figures of the fleet study: stall against scale, redundancy's worth."""

import pathlib

from resilient_moe.report import fleet, style

pareto = fleet.pareto


def draw(samples: fleet.Samples, folder: pathlib.Path) -> list[pathlib.Path]:
  """Draws both figures; none where there are no samples."""
  paths: list[pathlib.Path] = []
  with style.context():
    for name, make in (
      ("stall_scale", fleet.stall_scale_figure),
      ("redundancy_availability", fleet.redundancy_figure),
    ):
      figure = make(samples)
      if figure is not None:
        paths += style.save(figure, folder / name)
  return paths
