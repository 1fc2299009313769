"""The command line of a launcher: a config file, its keys, a work directory."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags


class Asked(NamedTuple):
  """The command line, parsed."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path  # the current one where a launcher writes nothing


def parse(argv: Sequence[str], example: str, workdir: bool = True) -> Asked:
  """The config and the work directory of a command line.

  Args:
    argv: as `sys.argv`.
    example: the config file that a launcher comes with.
    workdir: whether one must be given; else there is no such flag.

  Raises:
    ValueError: with the reason in one line.
  """
  values = flags.FlagValues()  # our own: a process may load several launchers
  config_flags.DEFINE_config_file(
    "config", None, "What to do.", flag_values=values, sys_argv=list(argv)
  )
  if workdir:
    flags.DEFINE_string(
      "workdir", None, "Where the results go.", flag_values=values
    )
  try:
    rest = values(list(argv))[1:]
    # An error in the file is raised on the first look at the config.
    given = values.config and values.config.to_dict() is not None
  except (
    flags.Error, AttributeError, ImportError, KeyError, OSError, SyntaxError,
    TypeError,
  ) as error:  # fmt: skip
    raise ValueError(" ".join(str(error).split())) from error
  if rest:
    raise ValueError(f"{rest[0]!r} is neither a flag nor a value of one")
  if not given:
    raise ValueError(f"--config is missing; there is {example}")
  if not workdir:
    return Asked(values.config, pathlib.Path())
  if not values.workdir:
    raise ValueError("--workdir is missing; needed is a folder for results")
  return Asked(values.config, pathlib.Path(values.workdir).absolute())
