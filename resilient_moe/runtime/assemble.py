"""Builds an engine's backend from a case: weights, programs, redundancy."""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from resilient_moe.faults import Injector
from resilient_moe.mesh.executables import Executables
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.params import expert_bytes
from resilient_moe.model.step import cache_shape, request_kv_shape
from resilient_moe.recovery import (
  ClusterView,
  RecoveryPolicy,
  Standing,
  bare_view,
)
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.opening import Restarted, opening
from resilient_moe.report import Recorder
from resilient_moe.runtime.case import Case, make_policy
from resilient_moe.runtime.checkpoints import read_config
from resilient_moe.runtime.device_store import DeviceStore
from resilient_moe.runtime.emulated import EmulatedBackend
from resilient_moe.runtime.execute import canary
from resilient_moe.runtime.kv_checkpoint import KVCheckpointer
from resilient_moe.runtime.logical_store import (
  LogicalExecutables,
  LogicalStore,
)
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.runtime.stages import Stages
from resilient_moe.runtime.weights import WeightTiers


@dataclasses.dataclass(frozen=True)
class Fresh:
  """What a fresh engine takes over from the one before it, if any."""

  generation: int = 0
  ranks: tuple[int, ...] = ()  # the mesh after a restart
  dead: tuple[int, ...] = ()
  epoch: int = 0
  first_step: int = 0
  injector: str = ""  # its state as JSON
  began_s: float = 0.0  # when the restart began
  paused: tuple[str, ...] = ()
  cache: bool = False
  whole: bool = False  # all ranks anew, because the engine was killed


@dataclasses.dataclass(frozen=True)
class Plans:
  """What is known before any array exists."""

  config: ModelConfig
  policy: RecoveryPolicy
  standing: Standing
  view: ClusterView
  shape: InstanceShape
  base_rows: int  # rows a rank needs without any loss


def plan_instance(case: Case, fresh: Fresh) -> Plans:
  """The policy's standing reserve and the shapes that follow from it."""
  config = read_config(case.checkpoint, case.dtype)
  options = StepOptions(**case.options)
  policy = make_policy(case)
  numbers = int(np.prod(cache_shape(config, options)))
  token_kv = numbers * np.dtype(config.dtype).itemsize
  token_kv //= options.rows * options.cache_len
  bare = bare_view(
    case.ranks, config.n_experts, spares=policy.spares, top_k=config.top_k,
    rows_per_rank=options.rows, expert_bytes=expert_bytes(config),
    token_kv_bytes=token_kv, attention=case.attention,
  )  # fmt: skip
  standing = policy.prepare(bare)
  restarted = None
  if fresh.generation:
    restarted = Restarted(fresh.ranks, fresh.dead, fresh.epoch, fresh.cache)
  view = opening(bare, standing, restarted)
  shape = InstanceShape(
    config,
    dataclasses.replace(options, rows=view.rows_per_rank),
    view.slots_per_rank,
    view.table.entries.shape[1],
  )
  return Plans(config, policy, standing, view, shape, options.rows)


def assemble(
  case: Case,
  plans: Plans,
  fresh: Fresh,
  devices: Sequence[jax.Device],
  scratch: pathlib.Path,
  recorder: Recorder,
) -> EmulatedBackend:
  """An engine ready to serve; each stage is recorded with its seconds."""
  stage = stages_of(recorder, fresh.generation)
  weights = WeightTiers(
    case.checkpoint, case.dtype, plans.standing.host_weights
  )
  stage.done("weights")
  folder = store_folder(case, plans, fresh, scratch)
  logical = case.runtime == "logical"
  kind = LogicalExecutables if logical else Executables
  executables = kind(plans.shape, None if logical else folder)
  mesh = tuple(plans.view.mesh.tolist())
  readiness = Readiness(
    executables, folder, len(devices), recorder.write,
    by_step=bool(case.sim.get("by_step")),
  )  # fmt: skip
  if not fresh.generation and case.wait_ready:
    # Traffic waits for it, so it may as well share the cores from the start.
    _want(readiness, plans)
  _fetch(executables, plans.shape, [devices[r] for r in mesh])
  stage.done("executables")
  make = LogicalStore if logical else DeviceStore
  store = make(plans.shape, devices, executables)
  for rank in np.flatnonzero(plans.view.alive()).tolist():
    held = plans.view.slots[rank].tolist()
    store.add(rank, weights.dense, weights.slots(held))
  store.wait()
  weights.filled()
  stage.done("placing")
  backend = _backend(
    case, plans, fresh, store, weights, readiness, recorder
  )
  _warm(backend)
  stage.done("first_step")
  if not fresh.generation and not case.wait_ready:
    _want(readiness, plans)
  return backend


def store_folder(
  case: Case, plans: Plans, fresh: Fresh, scratch: pathlib.Path
) -> pathlib.Path:
  """Where an engine's executables are; they belong to one run.

  A cold restart finds none, and one with other shapes none that fit.
  """
  if not fresh.generation:
    return scratch / "executables"
  if not fresh.cache:
    return scratch / f"cold{fresh.generation}"
  same = plan_instance(case, Fresh()).shape == plans.shape
  slots = "" if same else f"_{plans.shape.slots}_slots"
  return scratch / f"executables{slots}"


def stages_of(recorder: Recorder, generation: int) -> Stages:
  """Records how long each stage of a start took."""
  return Stages(
    lambda stage, seconds: recorder.write(
      "engine", stage=stage, seconds=seconds, generation=generation
    )
  )


def _fetch(
  executables: Executables, shape: InstanceShape, devices: list[jax.Device]
) -> None:
  """The step programs of the first mesh, compiled side by side."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    jobs = [
      pool.submit(executables.step, width, devices) for width in shape.chunks()
    ]
    for job in jobs:
      job.result()


def _backend(
  case: Case,
  plans: Plans,
  fresh: Fresh,
  store: DeviceStore | LogicalStore,
  weights: WeightTiers,
  readiness: Readiness,
  recorder: Recorder,
) -> EmulatedBackend:
  standing = plans.standing
  checkpointer = make_checkpointer(case, plans, recorder)
  return EmulatedBackend(
    plans.view, standing, store, weights, checkpointer, readiness,
    make_injector(case, plans, fresh), recorder.write, recorder.now_s,
  )  # fmt: skip


def make_injector(case: Case, plans: Plans, fresh: Fresh) -> Injector:
  """The case's faults, less those that an engine before this one had."""
  if not fresh.injector:
    return Injector(case.faults)
  return Injector.from_json(fresh.injector, len(plans.view.status))


def _want(readiness: Readiness, plans: Plans) -> None:
  """Which meshes to keep ready is the policy's choice."""
  readiness.want(plans.view.launched, plans.standing.ready)


def make_checkpointer(
  case: Case, plans: Plans, recorder: Recorder
) -> KVCheckpointer | None:
  """What keeps KV off the ranks, if the policy wants that."""
  if plans.standing.checkpoint == "none":
    return None
  options = plans.shape.options
  return KVCheckpointer(
    plans.standing.checkpoint, request_kv_shape(plans.config, options),
    plans.config.dtype, options.rows * len(request_ranks(plans.view)),
    lambda text: recorder.write("warning", text=text),
    by_step=bool(case.sim.get("by_step")),
  )  # fmt: skip


def _warm(backend: EmulatedBackend) -> None:
  """Runs every program once: steps, commits and slot writes."""
  for width in backend.store.shape.chunks():
    backend.run_once(backend.facts.mesh, width)
  backend.store.warm_rank_programs()
  backend.canary_token = canary(backend)
