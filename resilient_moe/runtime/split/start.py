"""Builds an emulated engine whose attention and experts are apart."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from resilient_moe.mesh.executables import Executables
from resilient_moe.recovery import Role
from resilient_moe.report import Recorder
from resilient_moe.runtime.assemble import (
  Fresh,
  Plans,
  make_checkpointer,
  make_injector,
  stages_of,
  store_folder,
)
from resilient_moe.runtime.case import Case
from resilient_moe.runtime.execute import canary
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.runtime.split.emulated import SplitEmulated
from resilient_moe.runtime.split.families import compile_families
from resilient_moe.runtime.split.options import ExchangeOptions
from resilient_moe.runtime.split.store import SplitStore
from resilient_moe.runtime.weights import WeightTiers


def assemble(
  case: Case,
  plans: Plans,
  fresh: Fresh,
  devices: Sequence[jax.Device],
  scratch: pathlib.Path,
  recorder: Recorder,
) -> SplitEmulated:
  """An engine ready to serve; each stage is recorded with its seconds."""
  stage = stages_of(recorder, fresh.generation)
  weights = WeightTiers(
    case.checkpoint, case.dtype, plans.standing.host_weights
  )
  stage.done("weights")
  folder = store_folder(case, plans, fresh, scratch)
  executables = Executables(plans.shape, folder)
  compile_families(executables, devices[0])
  stage.done("executables")
  options = ExchangeOptions(**case.exchange)
  store = SplitStore(
    plans.shape, devices, executables,
    # Nobody can push while a rank of this process waits for it.
    dataclasses.replace(options.healing(), push_s=0.0), options.dedup,
  )  # fmt: skip
  view = plans.view
  for rank in np.flatnonzero(view.alive()).tolist():
    held = view.slots[rank].tolist()
    store.add(rank, weights, held, Role(view.role[rank]))
  store.wait()
  weights.filled()
  stage.done("placing")
  backend = SplitEmulated(
    view, plans.standing, store, weights,
    make_checkpointer(case, plans, recorder),
    Readiness(executables, folder, len(devices), recorder.write),
    make_injector(case, plans, fresh), recorder.write, recorder.now_s,
    seed=case.seed,
  )  # fmt: skip
  store.warm()
  backend.canary_token = canary(backend)
  stage.done("first_step")
  return backend

