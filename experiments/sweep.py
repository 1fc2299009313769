"""Runs the jobs of a comparison in a work directory, and goes on with it.

A job's folder holds `case.json` (what was run, and its digest) from its start
and `verdict.json` from its end, so a folder says by itself whether it is
finished, interrupted or another comparison's.

As a program it sweeps config values, seeds and policies: `sweep_points`.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.cases import TWIN, Job
from experiments.settings import Settings
from resilient_moe import report
from resilient_moe.report.runs import write_text
from resilient_moe.runtime.case import Case, RunFailed
from resilient_moe.runtime.gateway import SCRATCH, killed

Watch = Callable[[dict[str, Any]], None]
RunCase = Callable[[Case, pathlib.Path, Watch], None]

# What may grow or change over the sweeps of one work directory. All else must
# be equal, or rows of a table would not be comparable. The policies' arguments
# are part of each case.
_MAY_CHANGE = {
  "faults",
  "leave_out",
  "only",
  "policies",
  "policy_kwargs",
  "scenarios",
  "seeds",
  "shared_twin",
  "slo",
}
_RUN_FILES = (
  "case.json",
  "engine.log",
  "history.jsonl",
  "history.jsonl.partial",
  "outputs.jsonl",
  "outputs.jsonl.partial",
  "verdict.json",
)


def pending(
  workdir: pathlib.Path, settings: Settings, jobs: Sequence[Job]
) -> list[Job]:
  """The jobs that are not finished; looks, and writes nothing.

  Raises:
    ValueError: the directory holds what another config made, or can't be read.
  """
  try:
    _check_same_comparison(workdir, settings)
    return [job for job in jobs if not _finished(workdir / job.place, job)]
  except OSError as error:
    raise ValueError(f"--workdir={workdir} can't be read: {error}") from error


def start(
  workdir: pathlib.Path, settings: Settings, provenance: Mapping[str, Any]
) -> None:
  """Makes the work directory; writes `config.json` and `provenance.json`.

  Raises:
    ValueError: it can't be written.
  """
  file = workdir / "provenance.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
    earlier = []
    if file.is_file():
      old = json.loads(file.read_text("utf-8"))
      earlier = [*old.pop("earlier", []), old]
    _write_json(workdir / "config.json", dataclasses.asdict(settings))
    _write_json(file, {**provenance, "earlier": earlier})
  except OSError as error:
    raise ValueError(
      f"--workdir={workdir} can't be written: {error}"
    ) from error


def run(
  job: Job, workdir: pathlib.Path, run_case: RunCase, watch: Watch
) -> str:
  """Runs one job and judges it; what came of it, in words."""
  folder = workdir / job.place
  folder.mkdir(parents=True, exist_ok=True)
  if not _goes_on(folder, job):
    for name in _RUN_FILES:
      (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
  _write_json(folder / "case.json", {"digest": job.digest, "case": job.record})
  try:
    run_case(job.case, folder, watch)
  except RunFailed as error:
    # What there is of the history is the bug report.
    partial = folder / "history.jsonl.partial"
    lines = partial.read_text("utf-8") if partial.is_file() else ""
    whole = lines[: lines.rfind("\n") + 1]
    write_text(folder / "history.jsonl", whole)
    partial.unlink(missing_ok=True)
    judge(workdir, job.place, job.twin_place, str(error))
  else:
    judge(workdir, job.place, job.twin_place)
  return describe(workdir, job)


def _goes_on(folder: pathlib.Path, job: Job) -> bool:
  """Whether this very run of processes was killed and can be resumed."""
  same = _read_json(folder / "case.json").get("digest") == job.digest
  return same and killed(folder) and job.case.runtime == "process"


def judge(
  workdir: pathlib.Path,
  place: pathlib.PurePath,
  twin_place: pathlib.PurePath,
  error: str | None = None,
) -> None:
  """Writes a run's `verdict.json` from its history and its twin's.

  With `error`, why the run failed, the verdict is never a valid one.
  """
  events = report.read_history(workdir / place / "history.jsonl")
  twin = twin_folder(workdir, twin_place)
  # A twin that failed proves nothing.
  failed = place == twin_place or error_of(twin)
  verdict = report.verdict(events, None if failed else events_of(twin))
  if error is not None:
    verdict["error"] = error
    verdict["failed"] = [*verdict["failed"], "run failed"]
    if verdict["overall"] in report.VALID:
      verdict["overall"] = "unknown"
  _write_json(workdir / place / "verdict.json", verdict)


def twin_folder(
  workdir: pathlib.Path, twin_place: pathlib.PurePath
) -> pathlib.Path:
  """Where the twin lies: the case's own, else the one that a seed shares.

  Either is the same run: a twin has no faults, whatever the scenario.
  """
  own = workdir / twin_place
  return own if own.is_dir() else workdir / TWIN / TWIN / own.name


def error_of(folder: pathlib.Path) -> str | None:
  """Why the run in this folder failed; None if it didn't."""
  return verdict_of(folder).get("error")


def describe(workdir: pathlib.Path, job: Job) -> str:
  """The verdict in words."""
  verdict = verdict_of(workdir / job.place)
  if verdict.get("error"):
    return f"failed: {verdict['error']}"
  failed = verdict.get("failed")  # none: the folder is gone
  why = f" ({', '.join(failed)})" if failed else ""
  return f"verdict {verdict['overall']}{why}"


def complaints(workdir: pathlib.Path, jobs: Iterable[Job]) -> list[str]:
  """One sentence for each run that failed or whose history doesn't check."""
  return [
    f"{job.place}: {describe(workdir, job)}"
    for job in jobs
    if verdict_of(workdir / job.place).get("overall") not in report.VALID
  ]


def _finished(folder: pathlib.Path, job: Job) -> bool:
  """Whether the job was run to its end; a run that failed is run again."""
  verdict = verdict_of(folder)
  if not verdict:
    return False
  found = _read_json(folder / "case.json")
  if found.get("digest") != job.digest:
    old, new = found.get("case", {}), job.record
    key = next((k for k in new if old.get(k) != new[k]), "case.json")
    raise ValueError(
      f"{folder} holds the run of another config: {key} is"
      f" {_brief(old.get(key))} there, {_brief(new.get(key))} now; choose a new"
      " --workdir"
    )
  return "error" not in verdict


def _check_same_comparison(workdir: pathlib.Path, settings: Settings) -> None:
  """What is in the directory was made with the same config, lists apart."""
  if not any(workdir.glob("*/*/seed*")):
    return
  old = _read_json(workdir / "config.json")
  if not old:
    raise ValueError(
      f"--workdir={workdir} holds runs without a config.json; choose a new one"
    )
  # A key that is younger than the directory was at its default there.
  old = {**_defaults(), **old}
  new = json.loads(json.dumps(dataclasses.asdict(settings)))
  for key in sorted(new.keys() - _MAY_CHANGE):
    if old.get(key) != new[key]:
      raise ValueError(
        f"--workdir={workdir} holds runs of another config: {key} is"
        f" {_brief(old.get(key))} there, {_brief(new[key])} now; choose a new"
        " --workdir"
      )


def _defaults() -> dict[str, Any]:
  """Of the settings that have one, as they stand in `config.json`."""
  found = {}
  for field in dataclasses.fields(Settings):
    if field.default_factory is not dataclasses.MISSING:
      found[field.name] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
      found[field.name] = field.default
  plain: dict[str, Any] = json.loads(json.dumps(found))
  return plain


def _brief(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def events_of(folder: pathlib.Path) -> list[report.Event] | None:
  """The history of the run in this folder; None if it left none."""
  file = folder / "history.jsonl"
  return report.read_history(file) if file.is_file() else None


def verdict_of(folder: pathlib.Path) -> dict[str, Any]:
  """What its `verdict.json` says; empty where there is none."""
  return _read_json(folder / "verdict.json")


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  """A JSON object; empty where there is none that can be read."""
  try:
    found = json.loads(file.read_text("utf-8"))
  except (FileNotFoundError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _write_json(file: pathlib.Path, value: Any) -> None:
  write_text(file, json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
  from experiments import sweep_points  # which needs this module itself

  sys.exit(sweep_points.launch(sys.argv))
