"""What the benchmarks are run on: settings, models, requests, devices."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.cases import ASSETS
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.model.checkpoint import read_config, save_checkpoint
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.params import init_params
from resilient_moe.serving.request import Request
from resilient_moe.serving.workload import make_requests

DONE = "manifest.json"  # the last file of a checkpoint


@dataclasses.dataclass(frozen=True)
class Model:
  """A model with the load that it is measured under."""

  checkpoint: str  # a folder, or a shipped model; "": random weights
  model: Mapping[str, Any]  # fields of `ModelConfig`, where it is random
  options: Mapping[str, Any]  # fields of `StepOptions`
  workload: Mapping[str, Any]
  fault_step: int
  seeds: tuple[int, ...]
  kv_restore_steps: float  # the target, in median steps
  split: bool = True  # whether the disaggregated deployment is measured too


@dataclasses.dataclass(frozen=True)
class Split:
  """What is measured of the disaggregated deployment.

  Attributes:
    ranks: attention and expert ranks together.
    attention: of them, attention ranks.
    processes: ranks of the collocated engines on processes beside it.
    block_steps: steps of a block on processes.
    restore_tokens: lengths of the requests that are restored.
    restore_repeats: how often each is restored, prefilled and run again.
    pingpong_rows: rows of the whole batches.
    shape: fields of `ModelConfig`, a model with Mixtral-8x7B's ratios.
    stall: keys of `configs/disaggregated.py` that are different.
  """

  ranks: int
  attention: int
  processes: tuple[int, ...]
  block_steps: int
  restore_tokens: tuple[int, ...]
  restore_repeats: int
  pingpong_rows: tuple[int, ...]
  shape: Mapping[str, Any]
  stall: Mapping[str, Any]

  @property
  def devices(self) -> int:
    """Most that an emulated engine has; `split_pingpong`'s attend in twos."""
    return max(self.ranks, self.ranks - self.attention + 2)


@dataclasses.dataclass(frozen=True)
class Settings:
  """The keys of the config (`configs/bench.py`)."""

  ranks: int
  policies: tuple[str, ...]
  models: Mapping[str, Model]
  pairs: int
  block_steps: int
  calls: int
  plan_ranks: int
  plan_repeats: int
  cache_lens: tuple[int, ...]
  dispatch_ranks: tuple[int, ...]
  contexts: tuple[int, ...]
  pause_s: float
  split: "Split"

  def apart(self) -> dict[str, Model]:
    """The models that the disaggregated deployment is measured with."""
    return {name: m for name, m in self.models.items() if m.split}


def read(config: ml_collections.ConfigDict) -> Settings:
  """The settings of a config, with the quick changes if it asks for them.

  Raises:
    ValueError: names the key that is wrong, and the choices.
  """
  fields = config.to_dict()
  changes = fields.pop("quick_changes")
  fields.pop("only")
  if fields.pop("quick"):
    fields.update(changes)
  policies = listed(fields.pop("policies"))
  names = listed(fields.pop("only_models"))
  try:
    models = {n: Model(**m) for n, m in fields.pop("models").items()}
    if unknown := [n for n in names if n not in models]:
      raise ValueError(
        f"config.only_models: unknown model {unknown[0]!r}; choices: "
        f"{', '.join(models)}"
      )
    models = {n: m for n, m in models.items() if not names or n in names}
    split = Split(**fields.pop("split"))
    return Settings(policies=policies, models=models, split=split, **fields)
  except TypeError as error:
    keys = ", ".join(f.name for f in dataclasses.fields(Settings))
    raise ValueError(f"config: {error}; keys: {keys}") from error


def listed(value: str | Sequence[str]) -> tuple[str, ...]:
  """The names in "a,b" or in a list; "" has none."""
  parts = value.split(",") if isinstance(value, str) else value
  return tuple(part.strip() for part in parts if part.strip())


def devices(n: int) -> list[jax.Device]:
  """`n` virtual devices of this process.

  Raises:
    ValueError: JAX has been started with fewer.
  """
  found = jax.devices()
  if len(found) < n:
    raise ValueError(f"{n} devices are needed; JAX has {len(found)}")
  return found[:n]


def folder_of(name: str, model: Model, workdir: pathlib.Path) -> pathlib.Path:
  """The model's checkpoint; random weights are written once."""
  if model.checkpoint:
    shipped = ASSETS / model.checkpoint
    return shipped if shipped.is_dir() else pathlib.Path(model.checkpoint)
  folder = workdir / "models" / name
  wanted = ModelConfig(**model.model)
  if not (folder / DONE).is_file() or read_config(folder) != wanted:
    folder.parent.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(0)
    save_checkpoint(folder, wanted, init_params(wanted, key))
  return folder.absolute()


def config_of(name: str, model: Model, workdir: pathlib.Path) -> ModelConfig:
  """The model's config."""
  return read_config(folder_of(name, model, workdir))


def requests_of(model: Model, seed: int) -> tuple[Request, ...]:
  """A seed's requests; all are there from the start."""
  return make_requests(**{**model.workload, "seed": seed})


def shape_of(
  config: ModelConfig, options: Mapping[str, Any], ranks: int
) -> InstanceShape:
  """The shape of an instance without any reserve."""
  slots = -(-config.n_experts // ranks)
  return InstanceShape(config, StepOptions(**options), slots, 1)


def interleaved(
  variants: Mapping[str, Callable[[], Any]], calls: int
) -> dict[str, list[float]]:
  """Seconds of each variant's calls; they take turns, in changing order.

  Every variant runs once before anything is timed.
  """
  for call in variants.values():
    call()
  found: dict[str, list[float]] = {name: [] for name in variants}
  rng = np.random.default_rng(0)
  names: Sequence[str] = list(variants)
  for _ in range(calls):
    for index in rng.permutation(len(names)):
      start = time.perf_counter()
      variants[names[index]]()
      found[names[index]].append(time.perf_counter() - start)
  return found
