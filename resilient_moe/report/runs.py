"""The runs that a work directory holds: DIR/<scenario>/<policy>/seed<seed>/."""

import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

from resilient_moe.report.history import Event, read_history
from resilient_moe.report.judge import VALID

Path = str | pathlib.Path
TWIN = "none"  # the policy name of the fault-free run


@dataclasses.dataclass(frozen=True)
class Run:
  """One run as it lies on disk. `run` is its first event, {} if unreadable."""

  scenario: str
  policy: str
  seed: str
  events: list[Event]
  verdict: dict[str, Any]

  @property
  def run(self) -> Event:
    return next((e for e in self.events if e["event"] == "run"), {})

  @property
  def valid(self) -> bool:
    return self.verdict["overall"] in VALID


def _unknown(reason: str) -> dict[str, Any]:
  return {"overall": "unknown", "failed": [reason], "checkers": {}}


def _read_run(folder: pathlib.Path) -> Run:
  scenario, policy, seed = folder.parts[-3:]
  events: list[Event] = []
  try:
    events = read_history(folder / "history.jsonl")
    verdict = json.loads((folder / "verdict.json").read_text("utf-8"))
    if "overall" not in verdict:
      verdict = _unknown("verdict.json has no `overall`")
  except FileNotFoundError as error:
    verdict = _unknown(f"{pathlib.Path(error.filename).name} is missing")
  except ValueError:
    verdict = _unknown("unreadable")
  return Run(scenario, policy, seed.removeprefix("seed"), events, verdict)


def read_runs(folder: Path) -> list[Run]:
  """All runs below a work directory, whatever state they are in.

  A run whose history or verdict is missing or can't be read has the verdict
  `unknown`, so that it shows up in a table as invalid and not as nothing.
  """
  found = sorted(pathlib.Path(folder).glob("*/*/seed*"))
  return [_read_run(each) for each in found if each.is_dir()]


def find(runs: list[Run], like: Run, policy: str) -> Run | None:
  """The run of `policy` in the scenario and with the seed of `like`.

  The twin may be one that all scenarios of a seed share.
  """
  scenarios = (like.scenario, TWIN) if policy == TWIN else (like.scenario,)
  for scenario in scenarios:
    for run in runs:
      if (run.scenario, run.policy, run.seed) == (scenario, policy, like.seed):
        return run
  return None


def write_text(path: Path, text: str) -> None:
  """Writes a file whole or not at all."""
  path = pathlib.Path(path)
  descriptor, temporary = tempfile.mkstemp(
      dir=path.parent, prefix=f".{path.name}."
  )
  try:
    with open(descriptor, "w", encoding="utf-8") as file:
      file.write(text)
    # mkstemp makes files that only their owner can read.
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
