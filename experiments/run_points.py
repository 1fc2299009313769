"""What a sweep needs of `experiments.run`: its jobs as tasks."""

import pathlib
from collections.abc import Sequence

import ml_collections

from experiments import cases, settings, sweep
from experiments.provenance import provenance
from experiments.simulated import SimOptions, run_simulated
from experiments.tasks import Task
from resilient_moe import report
from resilient_moe.runtime.gateway import run_case


class Runs:
  """Comparisons by `experiments.run`."""

  @staticmethod
  def simulated(config: ml_collections.ConfigDict) -> bool:
    """Whether runs use no device, and may go side by side."""
    return settings.read(config).runtime == "simulated"

  @staticmethod
  def tasks(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    argv: Sequence[str],
  ) -> list[Task]:
    """The runs that are to do; twins first, which others are judged by."""
    chosen = settings.read(config)
    jobs = cases.jobs(chosen)
    todo = sweep.pending(workdir, chosen, jobs)
    if todo or not workdir.is_dir():
      origin = provenance(
        "experiments.sweep", argv, chosen.runtime, chosen.ranks
      )
      if chosen.runtime == "simulated":
        origin["timing"] = SimOptions(**chosen.sim).timing().note
      sweep.start(workdir, chosen, origin)
    return [
      Task(
        f"{workdir.name}: {job.place}",
        int(job.case.policy != cases.TWIN),
        run_job,
        (job, workdir),
      )
      for job in todo
    ]

  @staticmethod
  def conclude(
    workdir: pathlib.Path, config: ml_collections.ConfigDict
  ) -> list[str]:
    """Writes the point's tables and figures; what went wrong."""
    chosen = settings.read(config)
    report.write_tables(workdir, **chosen.slo)
    report.timeline(workdir)
    jobs = cases.jobs(chosen)
    return [
      f"{workdir.name}: {each}" for each in sweep.complaints(workdir, jobs)
    ]


def run_job(job: cases.Job, workdir: pathlib.Path) -> str:
  """Runs one job; what came of it, in words."""
  simulated = job.case.runtime == "simulated"
  runner = run_simulated if simulated else run_case
  return sweep.run(job, workdir, runner, lambda event: None)
