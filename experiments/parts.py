"""A campaign in parts: settings that differ, each in a folder of its own.

  config.parts = {
    "collocated": {"ranks": 4, "policies": "kv_restore,mesh_shrink"},
    "disaggregated": {"deployment": "disaggregated", "ranks": 6, ...},
  }

A part gives keys of `settings.Settings` in place of the config's; what is a
table there (options, workload, policy_kwargs, ...) is changed, not replaced.
PART names a folder of the work directory, which is like that of a campaign
without parts, and the case to run is PART/SCENARIO/POLICY/seedN.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments import cases, settings, sweep
from experiments.settings import PARTS, Settings

REPEATS = "repeat"  # folder in the work directory for cases that are repeated


@dataclasses.dataclass(frozen=True)
class Part:
  """Cases with the same settings, and those of them that are to be run."""

  name: str  # "": the whole of a config without parts
  workdir: pathlib.Path
  chosen: Settings
  jobs: list[cases.Job]
  todo: list[cases.Job]

  def place(self, job: cases.Job) -> pathlib.PurePath:
    """The case's folder in the campaign's work directory."""
    return pathlib.PurePath(self.name, job.place)


def read(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[Part]:
  """The parts of a config; one without a name if it has none.

  Raises:
    ValueError: for the first thing that is wrong with any of them.
  """
  given = json.loads(config.to_json_best_effort())
  parts = given.pop(PARTS, None)
  if parts is None:
    return [_part("", workdir, given)]
  if not isinstance(parts, dict) or not parts:
    raise ValueError(f"config.{PARTS}={parts!r}: needed are names with tables")
  for name, changes in parts.items():
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == REPEATS:
      raise ValueError(
        f"config.{PARTS}.{name}: a part is the name of a folder, of letters,"
        f" digits, - and _, and not {REPEATS}"
      )
    if not isinstance(changes, dict):
      raise ValueError(
        f"config.{PARTS}.{name}={changes!r}: needed are keys with values"
      )
  return [
    _named(name, workdir, _changed(given, parts[name]))
    for name in _asked(given, parts)
  ]


def _asked(given: dict[str, Any], parts: Mapping[str, Any]) -> list[str]:
  """All parts; or that of the only case, whose path then begins below it."""
  only = given.get("only")
  if not only:
    return list(parts)
  name, _, place = str(only).partition("/")
  if name not in parts:
    raise ValueError(
      f"config.only={only!r}: needed is PART/SCENARIO/POLICY/seedN; parts:"
      f" {', '.join(parts)}"
    )
  given["only"] = place
  return [name]


def _changed(given: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
  """The config with a part's values in it."""
  found = dict(given)
  for key, value in changes.items():
    both = isinstance(value, dict) and isinstance(found.get(key), dict)
    found[key] = {**found[key], **value} if both else value
  return found


def _named(name: str, workdir: pathlib.Path, given: dict[str, Any]) -> Part:
  try:
    return _part(name, workdir / name, given)
  except ValueError as error:
    raise ValueError(f"config.{PARTS}.{name}: {error}") from error


def _part(name: str, workdir: pathlib.Path, given: dict[str, Any]) -> Part:
  # Names of policies with dots are keys of their own here.
  config = ml_collections.ConfigDict(given, allow_dotted_keys=True)
  chosen = dataclasses.replace(settings.read(config), shared_twin=True)
  jobs = cases.jobs(chosen)
  open_places = {job.place for job in sweep.pending(workdir, chosen, jobs)}
  # The only case is run again, finished or not.
  todo = [
    job
    for job in jobs
    if job.place in open_places or str(job.place) == chosen.only
  ]
  return Part(name, workdir, chosen, jobs, todo)
