"""What a sweep needs of `experiments.fleet`: its cells as tasks."""

import pathlib
from collections.abc import Sequence

import ml_collections

from experiments import fleet, fleet_cells, fleet_settings
from experiments.provenance import provenance
from experiments.tasks import Task


class Fleets:
  """Fleet studies by `experiments.fleet`."""

  @staticmethod
  def simulated(config: ml_collections.ConfigDict) -> bool:
    """They all are."""
    del config
    return True

  @staticmethod
  def tasks(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    argv: Sequence[str],
  ) -> list[Task]:
    """The cells that are to do."""
    chosen = fleet_settings.read(config)
    todo = fleet.todo(workdir, chosen)
    fleet_cells.check(chosen)
    origin = provenance("experiments.sweep", argv, "simulated", chosen.ranks)
    if todo or not workdir.is_dir():
      fleet.start(workdir, chosen, origin)
    return [
      Task(
        f"{workdir.name}: {cell.label}, {cell.instances} groups, "
        f"seed {cell.seed}",
        0,
        fleet_cells.run_cell,
        (workdir, chosen, cell),
      )
      for cell in todo
    ]

  @staticmethod
  def conclude(
    workdir: pathlib.Path, config: ml_collections.ConfigDict
  ) -> list[str]:
    """Writes the point's tables and figures."""
    del config
    fleet.conclude(workdir)
    return []
