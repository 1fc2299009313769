"""What a config of the fleet study says, checked.

Each field is a key of the config. Errors name the value and the choices.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from resilient_moe.sim.arrivals import statistics
from resilient_moe.sim.devices import device
from resilient_moe.sim.failure_rates import (
  FailureModel,
  Repair,
  Stragglers,
  failure_model,
)
from resilient_moe.sim.shapes import shape


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a study; all but lists are equal in one work directory.

  Attributes:
    policies: labels; each names a policy, or has one in `policy_kwargs`.
    policy_kwargs: by label, arguments of its `make`; `policy` names whose.
    policy_defaults: arguments of every policy that takes them.
    cheapest_of: labels that `cheapest` chooses from, as they are configured.
    instances: numbers of groups; devices are as many times `ranks`.
    seeds: of faults and of the requests that they catch.
    model: a preset of `sim.shapes`.
    device: one of `sim.devices`.
    ranks: of a group, the expert-parallel size.
    attention: of them, those that only attend; 0: collocated.
    hosts_per_rack: hosts that a rack takes with it.
    days: of virtual time.
    rate: named in `sim.failure_rates.RATES`.
    multiplier: of all rates.
    repair: fields of `sim.failure_rates.Repair`.
    stragglers: fields of `sim.failure_rates.Stragglers`.
    utilisation: load over the capacity of a group without redundancy.
    trace: `code` or `conv`, of Azure's.
    traces: folder of the real traces; empty: drawn by their statistics.
    ttft_slo_s, tbt_slo_s: what goodput is counted against: wait for the first
      token, mean gap between the next.
    patience_s: clients that wait for longer leave.
    detect_s, straggler_s: when a loss, or a slow rank, is reported.
    restart_part: of a group; so many idle devices are worth a restart, where
      the policy brings none in by itself. 0: one is.
    chunk: prompt tokens that a rank prefills in a step.
    most_rows: of a rank.
    row_margin: positions that a row is reserved for, over the mean of a
      running request.
    jobs: processes; 0: as many as cores.
  """

  policies: tuple[str, ...]
  policy_kwargs: dict[str, dict[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  policy_defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
  cheapest_of: tuple[str, ...] = ()
  instances: tuple[int, ...] = (1,)
  seeds: tuple[int, ...] = (0,)
  model: str = "deepseek-v3"
  device: str = "h200"
  ranks: int = 64
  attention: int = 0
  hosts_per_rack: int = 4
  days: float = 30.0
  rate: str = "rsc1"
  multiplier: float = 1.0
  repair: dict[str, float] = dataclasses.field(default_factory=dict)
  stragglers: dict[str, float] = dataclasses.field(default_factory=dict)
  utilisation: float = 0.6
  trace: str = "conv"
  traces: str = ""
  ttft_slo_s: float = 5.0
  tbt_slo_s: float = 0.1
  patience_s: float = 60.0
  detect_s: float = 1.0
  straggler_s: float = 60.0
  restart_part: float = 0.0
  chunk: int = 128
  most_rows: int = 256
  row_margin: float = 1.25
  jobs: int = 0

  def failures(self) -> FailureModel:
    """How often what breaks."""
    return failure_model(
      self.rate,
      repair=_made("repair", Repair, self.repair),
      stragglers=_made("stragglers", Stragglers, self.stragglers),
      multiplier=self.multiplier,
    )


# Of one work directory these may grow; the others are the same for every row.
LISTS = ("instances", "jobs", "policies", "policy_kwargs", "seeds")


def _made(key: str, kind: type, given: Mapping[str, float]) -> Any:
  known = [field.name for field in dataclasses.fields(kind)]
  for name in given:
    if name not in known:
      raise ValueError(
        f"config.{key}.{name}: unknown key; choices: {', '.join(known)}"
      )
  return kind(**given)


def read(config: ml_collections.ConfigDict) -> Settings:
  """The settings of a config.

  Raises:
    ValueError: for the first thing that is wrong with it.
  """
  given = json.loads(config.to_json_best_effort())
  fields = {field.name: field for field in dataclasses.fields(Settings)}
  for key in given:
    if key not in fields:
      raise ValueError(
        f"config.{key}: unknown key; choices: {', '.join(sorted(fields))}"
      )
  if not given.get("policies"):
    raise ValueError("config.policies is missing: one or more labels")
  settings = Settings(
    **{
      key: _value(f"config.{key}", fields[key], value)
      for key, value in given.items()
    }
  )
  _check(settings)
  return settings


def _value(key: str, field: Any, value: Any) -> Any:
  """A value of the type that a field declares."""
  kind = str(field.type)
  if kind.startswith("tuple"):
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list) else [parts]
    if "int" not in kind:
      return tuple(str(part).strip() for part in parts)
    try:
      return tuple(int(part) for part in parts)
    except (TypeError, ValueError) as error:
      raise ValueError(f"{key}={value!r}: needed are integers") from error
  if kind.startswith("dict"):
    if not isinstance(value, dict):
      raise ValueError(f"{key}={value!r}: needed are names with values")
    return value
  if kind.endswith("float'>") or kind == "float":
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{key}={value!r}: needed is a number")
    return float(value)
  wanted = {"int": int, "<class 'int'>": int}.get(kind, str)
  if isinstance(value, bool) or not isinstance(value, wanted):
    raise ValueError(f"{key}={value!r}: needed is {wanted.__name__}")
  return value


def _check(s: Settings) -> None:
  shape(s.model)
  device(s.device)
  statistics(s.trace)
  s.failures()
  for name in ("policies", "seeds", "instances"):
    values = getattr(s, name)
    if not values or len(set(values)) < len(values):
      raise ValueError(f"config.{name}={values}: one or more, none twice")
  for name, low in (
    ("ranks", 2), ("attention", 0), ("hosts_per_rack", 1), ("chunk", 1),
    ("most_rows", 1), ("jobs", 0), ("patience_s", 0), ("detect_s", 0),
  ):  # fmt: skip
    if getattr(s, name) < low:
      raise ValueError(f"config.{name}={getattr(s, name)}: at least {low}")
  for name in ("days", "utilisation", "ttft_slo_s", "tbt_slo_s", "row_margin"):
    value = getattr(s, name)
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f"config.{name}={value}: more than 0")
  if min(s.instances) < 1 or min(s.seeds) < 0:
    raise ValueError(
      f"config.instances={s.instances}: from 1; config.seeds={s.seeds}: from 0"
    )
  if s.traces and not pathlib.Path(s.traces).is_dir():
    raise ValueError(f"config.traces={s.traces!r}: no such folder")
