"""One cell of the fleet study: a policy at a scale with a seed."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.fleet_settings import LISTS, Settings
from resilient_moe import recovery
from resilient_moe.recovery import ClusterView, Plan, RecoveryPolicy
from resilient_moe.report.runs import write_text
from resilient_moe.sim import arrivals, fleet
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.devices import device
from resilient_moe.sim.failure_rates import DAY_S
from resilient_moe.sim.fleet_price import unserved
from resilient_moe.sim.fleet_setting import Memory, Shape, template
from resilient_moe.sim.shapes import shape
from third_party import azure_traces

CHEAPEST = "cheapest"
_LOAD_SEED = 7  # of the drawn trace: the same for all cells


@dataclasses.dataclass(frozen=True)
class Cell:
  """What one run is."""

  label: str
  instances: int
  seed: int

  def folder(self, workdir: pathlib.Path, settings: Settings) -> pathlib.Path:
    """Where its files lie."""
    devices = self.instances * settings.ranks
    name = f"devices{devices}"
    return workdir / self.label / name / f"seed{self.seed}"


def cells(settings: Settings) -> list[Cell]:
  """All of them, small fleets first."""
  return [
    Cell(label, instances, seed)
    for instances in sorted(settings.instances)
    for seed in settings.seeds
    for label in settings.policies
  ]


def digest(settings: Settings, cell: Cell) -> str:
  """What a finished cell must agree in to be skipped."""
  record = dataclasses.asdict(settings)
  for name in LISTS:
    del record[name]
  labels = {cell.label}
  if cell.label == CHEAPEST:
    labels |= set(settings.cheapest_of)
  record["kwargs"] = {
    label: settings.policy_kwargs.get(label, {}) for label in sorted(labels)
  }
  record["cell"] = dataclasses.asdict(cell)
  text = json.dumps(record, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def costs_of(settings: Settings) -> Roofline:
  """How long things take."""
  return Roofline(
    device(settings.device), shape(settings.model), chunk=settings.chunk
  )


def load_of(settings: Settings) -> arrivals.Load:
  """What comes to each group."""
  if settings.traces:
    file = azure_traces.FILES[settings.trace]
    records = azure_traces.read(pathlib.Path(settings.traces) / file)
    return arrivals.trace_load(
      f"azure {settings.trace}",
      np.array([r.arrival_s for r in records]),
      np.array([r.context_tokens for r in records]),
      np.array([r.generated_tokens for r in records]),
    )
  rng = np.random.default_rng(_LOAD_SEED)
  minutes = max(int(np.ceil(settings.days * 24 * 60)), 1)
  return arrivals.generated_load(settings.trace, minutes, rng)


def study_of(
  settings: Settings, load: arrivals.Load, instances: int
) -> fleet.Study:
  """The fleet of a cell."""
  model, hardware = shape(settings.model), device(settings.device)
  return fleet.Study(
    model=fleet.Model(
      model.n_experts, model.top_k, model.expert_bytes, model.token_kv_bytes
    ),
    memory=Memory(float(hardware.memory_bytes), float(model.dense_bytes)),
    shape=Shape(
      load.running_context * settings.row_margin,
      settings.chunk,
      settings.most_rows,
      settings.tbt_slo_s,
    ),
    failures=settings.failures(),
    groups=instances,
    ranks=settings.ranks,
    attention=settings.attention,
    devices_per_host=int(hardware.devices_per_node),
    hosts_per_rack=settings.hosts_per_rack,
    days=settings.days,
    utilisation=settings.utilisation,
    ttft_slo_s=settings.ttft_slo_s,
    patience_s=settings.patience_s,
    detect_s=settings.detect_s,
    straggler_s=settings.straggler_s,
    restart_part=settings.restart_part,
  )


def policy_of(
  settings: Settings, label: str, costs: Roofline
) -> RecoveryPolicy:
  """The policy that a label stands for.

  Raises:
    ValueError: unknown policy or argument; names the choices.
  """
  if label == CHEAPEST and settings.cheapest_of:
    members = [policy_of(settings, n, costs) for n in settings.cheapest_of]
    found = recovery.cheapest(members, _price(settings, costs))
    return dataclasses.replace(found, name=label)
  kwargs = dict(settings.policy_kwargs.get(label, {}))
  name = kwargs.pop("policy", label)
  for key, value in settings.policy_defaults.items():
    if _takes(name, key):
      kwargs.setdefault(key, value)
  kwargs = {
    k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()
  }
  return dataclasses.replace(recovery.load(name, **kwargs), name=label)


def check(settings: Settings) -> None:
  """Every policy can be made and prepared at this scale.

  Raises:
    ValueError: one can't; names the value and the choices.
  """
  costs, load = costs_of(settings), load_of(settings)
  study = study_of(settings, load, min(settings.instances))
  policies = [policy_of(settings, n, costs) for n in settings.policies]
  for policy in (recovery.load("none"), *policies):
    bare = fleet.bare(study, policy.spares)
    template(bare, policy, costs, load, study.memory, study.shape)


def _takes(name: str, argument: str) -> bool:
  """Whether a policy of `policies/` has this argument."""
  if name not in recovery.policy_names():
    return False
  make = importlib.import_module(f"policies.{name}").make
  return argument in inspect.signature(make).parameters


def _price(
  settings: Settings, costs: Roofline
) -> Callable[[Plan, ClusterView], float]:
  """What `cheapest` goes by: until a group's next failure, or the end."""
  a_day = settings.failures().expected_failures(settings.ranks, 1.0)
  days = min(1 / a_day, settings.days) if a_day else settings.days
  load = load_of(settings)
  return unserved(costs, load, settings.chunk, days * DAY_S)


@functools.lru_cache(maxsize=2)
def _shared(key: str) -> tuple[Settings, Roofline, arrivals.Load]:
  """What all cells of a process share, made once."""
  settings = Settings(**_tuples(json.loads(key)))
  return settings, costs_of(settings), load_of(settings)


def _tuples(plain: dict[str, Any]) -> dict[str, Any]:
  return {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}


def run(settings: Settings, cell: Cell) -> fleet.Result:
  """Simulates one cell."""
  key = json.dumps(dataclasses.asdict(settings), sort_keys=True)
  settings, costs, load = _shared(key)
  return fleet.simulate(
    study_of(settings, load, cell.instances),
    policy_of(settings, cell.label, costs),
    recovery.load("none"),
    recovery.load("restart_cached"),
    costs,
    load,
    cell.seed,
  )


def run_into(folder: pathlib.Path, settings: Settings, cell: Cell) -> None:
  """Simulates a cell and writes its files; `sample.json` last."""
  result = run(settings, cell)
  folder.mkdir(parents=True, exist_ok=True)
  lines = "".join(json.dumps(record) + "\n" for record in result.records)
  write_text(folder / "events.jsonl", lines)
  record = {"digest": digest(settings, cell), **dataclasses.asdict(cell)}
  write_text(folder / "cell.json", json.dumps(record, indent=2) + "\n")
  sample = json.dumps(result.sample, indent=2)
  write_text(folder / "sample.json", sample + "\n")


def finished(folder: pathlib.Path, settings: Settings, cell: Cell) -> bool:
  """Whether the cell was run to its end with these settings.

  Raises:
    ValueError: the folder holds a cell of other settings.
  """
  if not (folder / "sample.json").is_file():
    return False
  found = json.loads((folder / "cell.json").read_text("utf-8"))
  if found["digest"] != digest(settings, cell):
    raise ValueError(
      f"{folder} holds a run with another config; choose a new --workdir"
    )
  return True


def run_cell(workdir: pathlib.Path, settings: Settings, cell: Cell) -> str:
  """Runs one cell of a study; what came of it, in words."""
  folder = cell.folder(workdir, settings)
  wall_s, cpu_s = time.perf_counter(), time.process_time()
  run_into(folder, settings, cell)
  wall_s = time.perf_counter() - wall_s
  cpu_s = time.process_time() - cpu_s
  sample = json.loads((folder / "sample.json").read_text("utf-8"))
  return (
    f"full service {100 * sample['full']:.3f}% of the time, simulated in "
    f"{wall_s:.1f} s ({cpu_s:.1f} s of CPU)"
  )
