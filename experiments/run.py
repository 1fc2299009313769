"""Runs a comparison: policies under the same faults and the same requests.

  python -m experiments.run --config=configs/quickstart.py --workdir=DIR \
      --config.policies=restart_cached,mesh_shrink --config.ranks=8 \
      --config.seeds=0,1,2 --config.policy_kwargs.kv_restore.checkpoint=host

The keys of a config are those of `settings.Settings`. For each scenario and
seed the fault-free twin runs first, then each policy. DIR then holds what
DESIGN section 8 lists. A finished run is skipped when asked again, an
interrupted sweep goes on, a run that failed is tried again.

Exit status: 0; 1 where a run failed or its history doesn't check; 2 for bad
input (one line on stderr, nothing written); 130 when interrupted.
"""

import ast
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments import cases, settings, showcase, sweep
from experiments.progress import Progress
from experiments.provenance import provenance
from experiments.simulated import SimOptions, run_simulated
from resilient_moe import report
from resilient_moe.runtime.gateway import run_case

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_POLICY_KWARGS = "config.policy_kwargs."


class Asked(NamedTuple):
  """The command line, parsed."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path


def parse(argv: Sequence[str]) -> Asked:
  """Reads the command line and the config file that it names.

  Raises:
    ValueError: with the reason in one line.
  """
  argv, kwargs = _split_policy_kwargs(argv)
  values = _flag_values(argv)
  if {"-h", "--help"} & set(argv):
    print(f"{__doc__}\n{values.get_help()}")
    sys.exit()
  if not any(arg.split("=")[0] in ("--config", "-config") for arg in argv):
    raise ValueError("--config is missing; there is configs/quickstart.py")
  try:
    rest = values(list(argv))[1:]
    # An error in the file is raised on the first look at the config.
    values.config.to_dict()
    values.config.policy_kwargs = _merged(
      values.config.get("policy_kwargs", {}), kwargs
    )
  except (
    flags.Error, ArithmeticError, AttributeError, ImportError, LookupError,
    NameError, OSError, SyntaxError, TypeError, ValueError,
  ) as error:  # fmt: skip
    raise ValueError(_no_table(argv, error) or _last_line(error)) from error
  if rest:
    raise ValueError(f"{rest[0]!r} is neither a flag nor a value of one")
  if not values.workdir:
    raise ValueError("--workdir is missing; needed is a folder for the results")
  return Asked(values.config, pathlib.Path(values.workdir).absolute())


def _flag_values(argv: Sequence[str]) -> flags.FlagValues:
  """Flags of our own: several launchers may be loaded into one process."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file.",
    flag_values=values,
    # A key that a config leaves at its default can be given too;
    # `settings.read` knows which keys there are.
    lock_config=False,
    accept_new_attributes=True,
    sys_argv=list(argv),
  )
  flags.DEFINE_string(
    "workdir", None, "Where the results go.", flag_values=values
  )
  return values


def _split_policy_kwargs(
  argv: Sequence[str],
) -> tuple[list[str], dict[str, dict[str, Any]]]:
  """Takes arguments of policies out, whose names no config can list.

  A policy may be a dotted path of any depth: the argument is the last part.
  """
  rest: list[str] = []
  found: dict[str, dict[str, Any]] = {}
  for arg in argv:
    path, equals, text = arg.lstrip("-").partition("=")
    if not (arg.startswith("-") and path.startswith(_POLICY_KWARGS)):
      rest.append(arg)
      continue
    policy, _, name = path.removeprefix(_POLICY_KWARGS).rpartition(".")
    if not (policy and name and equals):
      raise ValueError(
        f"{arg}: needed is --{_POLICY_KWARGS}POLICY.ARGUMENT=VALUE"
      )
    if text in ("true", "false"):
      text = text.capitalize()
    try:
      value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      value = text
    found.setdefault(policy, {})[name] = value
  return rest, found


def _merged(
  config: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]
) -> ml_collections.ConfigDict:
  """The config's arguments of policies, those of the command line on top."""
  merged = {policy: dict(kwargs) for policy, kwargs in config.items()}
  for policy, kwargs in given.items():
    merged[policy] = {**merged.get(policy, {}), **kwargs}
  # Names with dots are keys of their own here.
  return ml_collections.ConfigDict(merged, allow_dotted_keys=True)


def _no_table(argv: Sequence[str], error: Exception) -> str:
  """What to do where a flag sets a key of a table that the config lacks."""
  name = str(error).strip("\"'")
  for arg in argv:
    if isinstance(error, KeyError) and arg.lstrip("-").startswith(
      f"config.{name}."
    ):
      return f"{arg}: config.{name} = {{}} is missing in the config file"
  return ""


def _last_line(error: Exception) -> str:
  """What went wrong, without the traceback that ml_collections puts in it."""
  lines = [line for line in str(error).splitlines() if line.strip()]
  return lines[-1].strip() if lines else type(error).__name__


def launch(argv: Sequence[str]) -> int:
  """Runs what a command line asks for; the exit status."""
  try:
    asked = parse(argv)
    chosen = settings.read(asked.config)
    jobs = cases.jobs(chosen)
    todo = sweep.pending(asked.workdir, chosen, jobs)
    if todo or not asked.workdir.is_dir():
      origin = provenance(
        "experiments.run", argv, chosen.runtime, chosen.ranks
      )
      if chosen.runtime == "simulated":
        origin["timing"] = SimOptions(**chosen.sim).timing().note
      sweep.start(asked.workdir, chosen, origin)
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  try:
    _run_all(asked.workdir, jobs, todo)
  except KeyboardInterrupt:
    print(
      "\ninterrupted; the same command goes on from here", file=sys.stderr
    )
    return INTERRUPTED
  return _conclude(asked.workdir, chosen, jobs)


def _run_all(
  workdir: pathlib.Path,
  jobs: Sequence[cases.Job],
  todo: Sequence[cases.Job],
) -> None:
  """Runs the jobs that are to do; says so of the others."""
  for number, job in enumerate(jobs, 1):
    case = job.case
    title = (
      f"[{number}/{len(jobs)}] {case.policy}, {case.scenario}, seed {case.seed}"
    )
    if job in todo:
      progress = Progress(title)
      runner = run_simulated if case.runtime == "simulated" else run_case
      progress.close(sweep.run(job, workdir, runner, progress))
    else:
      print(f"{title}: done before; {sweep.describe(workdir, job)}")


def _conclude(
  workdir: pathlib.Path,
  chosen: settings.Settings,
  jobs: Sequence[cases.Job],
) -> int:
  """Writes and prints the comparison; the exit status."""
  rows = report.write_tables(workdir, **chosen.slo)
  figures = report.timeline(workdir)
  print(f"\n{report.to_markdown(rows)}")
  # A simulation's tokens are hashes: nothing to read.
  real = [job.case for job in reversed(jobs) if job.case.runtime != "simulated"]
  for case in {case.scenario: case for case in real}.values():
    found = showcase.example(workdir, case.scenario, case.seed)
    if found is not None:
      print(f"{showcase.show(found)}\n")
      break
  names = ["table.md", "table.csv", "table.tex", *(f.name for f in figures)]
  print(f"In {workdir}: {', '.join(names)};")
  print("each run's history.jsonl, outputs.jsonl and verdict.json in")
  print("  SCENARIO/POLICY/seedN/")
  problems = sweep.complaints(workdir, jobs)
  for problem in problems:
    print(f"error: {problem}", file=sys.stderr)
  return FAILED if problems else 0


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
