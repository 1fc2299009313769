"""What a config says, checked: the settings of a comparison.

Each field is a key of the config, so a config file, `config.json` and the
command line (`--config.ranks=4`) all use these names. Lists of names or
numbers may be written with commas (`--config.policies=none,kv_restore`), one
of them may stand alone. Errors name the value, the limit and the choices.
"""

import ast
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

SLOS = ("ttft_slo_s", "tbt_slo_s")
BY_SCENARIO, NO_FAULTS = "scenario", "none"  # values of `faults`
PARTS = "parts"  # the key that `parts.read` takes away


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a comparison; those without a default must be given.

  Attributes:
    checkpoint: folder of the model (one that `save_checkpoint` wrote, or a
      published one with config.json and *.safetensors), or the name of one
      that ships.
    dtype: what a published checkpoint's weights become, float32 or bfloat16;
      empty: what its config.json says that they are.
    workload: arguments of `serving.workload.make_requests`; a seed's requests
      are drawn with that seed.
    workloads: by scenario, what is different in its workload.
    policies: names, dotted paths, or "a+b": b takes over where a can't. The
      fault-free twin `none` is always run, and first.
    scenarios: names of `faults.SCENARIOS`.
    seeds: of the workload and of what a scenario draws.
    runtime: where the ranks live.
    deployment: which ranks do what.
    ranks: members of the expert-parallel group.
    attention: of them, ranks that do attention only, where the deployment is
      disaggregated; the others hold experts. 0: a third of them.
    exchange: fields of `runtime.split.options.ExchangeOptions` (dedup, stores,
      late_s, ...), for a disaggregated deployment.
    options: fields of `model.StepOptions`.
    policy_kwargs: by policy, arguments of its `make`.
    faults: `scenario`, `none` (nothing breaks), or a list of faults as
      `faults.parse_schedule` takes it, run as the scenario `custom`.
    fault_step: when a scenario's first fault strikes.
    fault_rank: whom it strikes first; -1: the seed draws one.
    fault_after_ready: faults wait until the ready meshes are ready.
    wait_ready: traffic waits until they are.
    detector: fields of `runtime.process.rules.Limits` (probe_interval_s,
      misses, stuck_s, ...), for the process runtime.
    cluster: fields of `runtime.process.cluster.Cluster` (listen, spawn,
      platform), for the process runtime.
    sim: fields of `experiments.simulated.SimOptions` (calibration, detect_s,
      ...), for the simulated runtime.
    slo: objectives that goodput is counted against.
    shared_twin: the fault-free twin is run once a seed, as the scenario
      `none`, and not once a scenario and seed.
    leave_out: SCENARIO/POLICY pairs that are not run.
    only: SCENARIO/POLICY/seedN, the one case to run (with its twin).
  """

  checkpoint: str
  workload: dict[str, Any]
  policies: tuple[str, ...]
  scenarios: tuple[str, ...]
  seeds: tuple[int, ...] = (0,)
  workloads: dict[str, dict[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  runtime: str = "emulated"
  deployment: str = "collocated"
  ranks: int = 8
  attention: int = 0
  exchange: dict[str, Any] = dataclasses.field(default_factory=dict)
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  policy_kwargs: dict[str, dict[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  faults: str | list[dict[str, Any]] = BY_SCENARIO
  fault_step: int = 20
  fault_rank: int = -1
  fault_after_ready: bool = False
  wait_ready: bool = True
  detector: dict[str, Any] = dataclasses.field(default_factory=dict)
  cluster: dict[str, Any] = dataclasses.field(default_factory=dict)
  sim: dict[str, Any] = dataclasses.field(default_factory=dict)
  slo: dict[str, float] = dataclasses.field(default_factory=dict)
  shared_twin: bool = False
  leave_out: tuple[str, ...] = ()
  only: str = ""
  dtype: str = ""


def read(config: ml_collections.ConfigDict) -> Settings:
  """The settings of a config.

  Raises:
    ValueError: for the first thing that is wrong with it.
  """
  given = json.loads(config.to_json_best_effort())
  known = {field.name: field for field in dataclasses.fields(Settings)}
  for key in given:
    if key == PARTS:
      raise ValueError(f"config.{key}: only experiments.campaign has parts")
    if key not in known:
      raise ValueError(
        f"config.{key}: unknown key; choices: {', '.join(sorted(known))}"
      )
  for key, field in known.items():
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and key not in given:
      raise ValueError(f"config.{key} is missing; it has no default")
  return Settings(
    **{key: _READERS[key](f"config.{key}", v) for key, v in given.items()}
  )


def _text(key: str, value: Any) -> str:
  if not isinstance(value, str) or not value:
    raise ValueError(f"{key}={value!r}: needed is a text that is not empty")
  return value


def _maybe(key: str, value: Any) -> str:
  return _text(key, value) if value else ""


def _integer(low: int) -> Callable[[str, Any], int]:
  def read_integer(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
      raise ValueError(f"{key}={value!r}: needed is an integer from {low}")
    return value

  return read_integer


def _truth(key: str, value: Any) -> bool:
  if not isinstance(value, bool):
    raise ValueError(f"{key}={value!r}: choices: True, False")
  return value


def _table(key: str, value: Any) -> dict[str, Any]:
  """Keyword arguments; lists become tuples, as a call would have them."""
  if not isinstance(value, dict):
    raise ValueError(f"{key}={value!r}: needed are names with values")
  return {
    name: tuple(v) if isinstance(v, list) else v for name, v in value.items()
  }


def _listed(key: str, value: Any) -> list[Any]:
  """The parts of "a,b", of a list, or the only one; none of them twice."""
  parts = value if isinstance(value, list) else [value]
  if isinstance(value, str):
    parts = [part.strip() for part in value.split(",")]
  if not parts or "" in parts:
    raise ValueError(
      f"{key}={value!r}: needed is one or more, separated by commas"
    )
  for i, part in enumerate(parts):
    if part in parts[:i]:
      raise ValueError(f"{key}={value!r}: {part!r} is there twice")
  return parts


def _names(key: str, value: Any) -> tuple[str, ...]:
  return tuple(_text(key, part) for part in _listed(key, value))


def _pairs(key: str, value: Any) -> tuple[str, ...]:
  """SCENARIO/POLICY pairs; there may be none."""
  pairs = _names(key, value) if value else ()
  for pair in pairs:
    _check_path(key, pair, "SCENARIO/POLICY")
  return pairs


def _place(key: str, value: Any) -> str:
  if value:
    _check_path(key, _text(key, value), "SCENARIO/POLICY/seedN")
  return value or ""


def _check_path(key: str, path: str, needed: str) -> None:
  parts = path.split("/")
  if len(parts) != needed.count("/") + 1 or not all(parts):
    raise ValueError(f"{key}={path!r}: needed is {needed}")


def _seeds(key: str, value: Any) -> tuple[int, ...]:
  parts = _listed(key, value)
  wrong = [p for p in parts if not str(p).isdecimal() or p is True]
  if wrong:
    raise ValueError(
      f"{key}={value!r}: {wrong[0]!r} is not a seed; needed are integers from"
      " 0, separated by commas"
    )
  return tuple(_listed(key, [int(part) for part in parts]))


def _faults(key: str, value: Any) -> str | list[dict[str, Any]]:
  choices = f"{BY_SCENARIO}, {NO_FAULTS} or a list of faults (dicts)"
  if isinstance(value, str) and value.startswith(("[", "(")):
    try:
      value = ast.literal_eval(value)
    except (SyntaxError, ValueError) as error:
      raise ValueError(
        f"{key}={value!r}: {error}; choices: {choices}"
      ) from error
  if value in (BY_SCENARIO, NO_FAULTS):
    return str(value)
  if not isinstance(value, list | tuple) or not value:
    raise ValueError(f"{key}={value!r}: choices: {choices}")
  return list(value)


def _slo(key: str, value: Any) -> dict[str, float]:
  for name, limit_s in _table(key, value).items():
    if name not in SLOS:
      raise ValueError(
        f"{key}.{name}: unknown objective; choices: {', '.join(SLOS)}"
      )
    if not isinstance(limit_s, int | float) or not limit_s > 0:
      raise ValueError(
        f"{key}.{name}={limit_s!r}: needed are seconds, more than 0"
      )
  return {name: float(limit_s) for name, limit_s in value.items()}


def _policy_kwargs(key: str, value: Any) -> dict[str, dict[str, Any]]:
  """By policy; a dotted path arrives as dicts in dicts."""
  found: dict[str, dict[str, Any]] = {}
  for path, argument in _leaves(_table(key, value)):
    policy, _, name = path.rpartition(".")
    if not policy:
      raise ValueError(
        f"{key}.{name}={argument!r}: needed is {key}.POLICY.ARGUMENT=VALUE"
      )
    found.setdefault(policy, {})[name] = argument
  return {policy: _table(key, kwargs) for policy, kwargs in found.items()}


def _workloads(key: str, value: Any) -> dict[str, dict[str, Any]]:
  """By scenario, keyword arguments."""
  return {
    name: _table(f"{key}.{name}", changes)
    for name, changes in _table(key, value).items()
  }


def _leaves(
  value: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
  """(dotted path, value) of everything in dicts in dicts."""
  for name, each in value.items():
    if isinstance(each, dict):
      yield from _leaves(each, (*path, name))
    else:
      yield ".".join((*path, name)), each


_READERS: dict[str, Callable[[str, Any], Any]] = {
  "attention": _integer(0),
  "checkpoint": _text,
  "cluster": _table,
  "deployment": _text,
  "detector": _table,
  "dtype": _maybe,
  "exchange": _table,
  "fault_after_ready": _truth,
  "fault_rank": _integer(-1),
  "fault_step": _integer(0),
  "faults": _faults,
  "leave_out": _pairs,
  "only": _place,
  "options": _table,
  "policies": _names,
  "policy_kwargs": _policy_kwargs,
  "ranks": _integer(1),
  "runtime": _text,
  "scenarios": _names,
  "seeds": _seeds,
  "shared_twin": _truth,
  "sim": _table,
  "slo": _slo,
  "wait_ready": _truth,
  "workload": _table,
  "workloads": _workloads,
}
