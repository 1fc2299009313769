"""Where the data of a paper lies, what made it, and what would make it."""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.provenance import ROOT

# By the module that makes a work directory, a file that shows it is finished.
MARKS = {
  "experiments.run": "*/*/seed*/history.jsonl",
  "experiments.fleet": "samples.jsonl",
  "experiments.lost_experts": "table.csv",
  "experiments.published": "published.csv",
}
_KEYS = ("commands", "make", "only", "sources")


@dataclasses.dataclass(frozen=True)
class Source:
  """One work directory.

  Attributes:
    name: its key in the config.
    folder: where it lies.
    arguments: of `python`, what makes it.
  """

  name: str
  folder: pathlib.Path
  arguments: tuple[str, ...]

  @property
  def module(self) -> str:
    """What makes it, as after `python -m`."""
    return self.arguments[1]

  @property
  def present(self) -> bool:
    """Whether there is anything to read."""
    return any(self.folder.glob(MARKS[self.module]))

  @property
  def command(self) -> str:
    """What would make it, to be typed."""
    return shlex.join(["python", *self.arguments])


@dataclasses.dataclass(frozen=True)
class Origin:
  """What made a work directory, by its own account; empty: it doesn't say."""

  commands: tuple[str, ...] = ()  # the newest first
  commit: str = ""
  dirty: bool | None = None
  date: str = ""
  device_kind: str = ""


def read(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[Source]:
  """The sources that a config asks for.

  Raises:
    ValueError: for the first thing that is wrong with it.
  """
  given = json.loads(config.to_json_best_effort())
  for key in given:
    if key not in _KEYS:
      raise ValueError(
        f"config.{key}: unknown key; choices: {', '.join(_KEYS)}"
      )
  if not isinstance(given.get("make", False), bool):
    raise ValueError(f"config.make={given['make']!r}: choices: True, False")
  folders, commands = given.get("sources", {}), given.get("commands", {})
  for name in folders:
    if name not in commands:
      raise ValueError(
        f"config.sources.{name}: config.commands.{name} is missing; it says"
        f" what makes it; there are {', '.join(commands)}"
      )
  only = [n.strip() for n in given.get("only", "").split(",") if n.strip()]
  for name in only:
    if name not in folders:
      raise ValueError(
        f"config.only={name!r}: no source; choices: {', '.join(folders)}"
      )
  return [
    _source(name, folders[name], commands[name], workdir)
    for name in only or folders
  ]


def _source(
  name: str, folder: str, command: str, workdir: pathlib.Path
) -> Source:
  where = workdir / "sources" / name
  if folder:
    where = pathlib.Path(folder).absolute()
    if not where.is_dir():
      raise ValueError(f"config.sources.{name}={folder!r}: no such folder")
  words = shlex.split(command)
  if not words or words[0] not in MARKS:
    raise ValueError(
      f"config.commands.{name}={command!r}: the first word is one of"
      f" {', '.join(MARKS)}"
    )
  arguments = ("-m", words[0], f"--workdir={where}", *words[1:])
  return Source(name, where, arguments)


def make(source: Source) -> bool:
  """Runs what makes a source, its output passed on; whether that went well."""
  print(f"== {source.name}: {source.command}", flush=True)
  # Configs are named from the root.
  done = subprocess.run([sys.executable, *source.arguments], cwd=ROOT)
  return done.returncode == 0


def origin(folder: pathlib.Path) -> Origin:
  """What a work directory's `provenance.json` says."""
  file = folder / "provenance.json"
  if not file.is_file():
    return Origin()
  found: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
  every = [found, *reversed(found.get("earlier", ()))]
  return Origin(
    tuple(dict.fromkeys(each["command"] for each in every)),
    found.get("commit") or "",
    found.get("dirty"),
    found.get("date", ""),
    found.get("device_kind", ""),
  )
