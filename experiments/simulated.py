"""Runs a case on the simulated runtime: from a case to what `sim` needs.

Same files as `runtime.gateway.run_case` leaves, in one process.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from resilient_moe.report import HistoryWriter
from resilient_moe.runtime.case import Case, RunFailed, make_policy
from resilient_moe.serving.recover import Unrecoverable
from resilient_moe.sim import devices, shapes
from resilient_moe.sim.case import ModelFacts, SimulatedCase
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.fitted import Fitted
from resilient_moe.sim.roofline_timing import RooflineTiming
from resilient_moe.sim.run import Run
from resilient_moe.sim.timing import Timing

Watch = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class SimOptions:
  """Fields of `case.sim`, for the simulated runtime.

  Attributes:
    calibration: one that ships, by name, or a file of experiments.calibrate.
    device: instead of a calibration, hardware of `sim.devices` by name.
    model: with a device: a model of `sim.shapes` by name, in the checkpoint's
      place (its vocabulary stays the checkpoint's).
    detect_s: seconds from a loss to its report, instead of the calibrated.
    by_step: readiness and checkpoints count steps, not seconds (see
      `sim.case`); the emulated runtime keeps to it too, to be compared.
  """

  calibration: str = "emulated"
  device: str = ""
  model: str = ""
  detect_s: float | None = None
  by_step: bool = False

  def __post_init__(self) -> None:
    if self.detect_s is not None and not self.detect_s >= 0:
      raise ValueError(f"sim.detect_s={self.detect_s}: 0 seconds or more")
    if bool(self.device) != bool(self.model):
      raise ValueError(
        f"sim.device={self.device!r}, sim.model={self.model!r}: a cost model "
        "needs both, a calibration none of them"
      )

  def timing(self) -> Timing:
    """How long everything takes."""
    if self.device:
      costs = Roofline(devices.device(self.device), shapes.shape(self.model))
      made = RooflineTiming(costs, f"{self.model} on {self.device}")
      if self.detect_s is None:
        return made
      return dataclasses.replace(made, detect=self.detect_s)
    fitted = Fitted.read(self.calibration)
    if self.detect_s is None:
      return fitted
    delays = dict.fromkeys(fitted.detect, (self.detect_s,))
    return dataclasses.replace(fitted, detect=delays)


def run_simulated(
  case: Case, folder: pathlib.Path, watch: Watch | None = None
) -> None:
  """Simulates a case; leaves `history.jsonl` and `outputs.jsonl` in `folder`.

  Raises:
    RunFailed: no policy in line could recover.
  """
  made = simulated_case(case)
  folder.mkdir(parents=True, exist_ok=True)
  partial = folder / "history.jsonl.partial"
  clock = VirtualClock()
  with HistoryWriter(partial, clock.now) as history:
    run = Run(made, SimOptions(**case.sim).timing(), clock, history, watch)
    try:
      run.run()
    except Unrecoverable as error:
      raise RunFailed(str(error)) from error
  outputs = folder / "outputs.jsonl.partial"
  lines = [json.dumps(o) for o in run.outputs()]
  outputs.write_text("".join(line + "\n" for line in lines))
  partial.rename(folder / "history.jsonl")
  outputs.rename(folder / "outputs.jsonl")


def simulated_case(case: Case) -> SimulatedCase:
  """What `sim` needs to know of a case."""
  # Loads JAX (and starts no device) for the shapes of parameters.
  from resilient_moe.model import StepOptions

  options, sim = StepOptions(**case.options), SimOptions(**case.sim)
  return SimulatedCase(
    name=case.policy,
    policy=make_policy(case),
    scenario=case.scenario,
    seed=case.seed,
    deployment=case.deployment,
    ranks=case.ranks,
    attention=case.attention,
    model=model_facts(
      case.checkpoint, case.options, sim.model, case.dtype
    ),
    rows=options.rows,
    chunk=options.chunk,
    max_len=options.max_len,
    cache_len=options.cache_len,
    requests=case.requests,
    faults=case.faults,
    wait_ready=case.wait_ready,
    by_step=sim.by_step,
  )


def model_facts(
  checkpoint: str,
  options: Mapping[str, Any],
  model: str = "",
  dtype: str = "",
) -> ModelFacts:
  """What a checkpoint's config, or the shape of `model`, says of its bytes.

  `dtype` is what a published checkpoint's weights become.
  """
  from resilient_moe.model import StepOptions
  from resilient_moe.model.params import dense_bytes, expert_bytes
  from resilient_moe.model.step import cache_shape
  from resilient_moe.runtime.checkpoints import read_config

  config, steps = read_config(checkpoint, dtype), StepOptions(**options)
  if model:
    shape = shapes.shape(model)
    return ModelFacts(
      vocab_size=config.vocab_size,
      n_experts=shape.n_experts,
      top_k=shape.top_k,
      moe_layers=shape.moe_layers,
      expert_bytes=shape.expert_bytes,
      dense_bytes=shape.dense_bytes,
      token_kv_bytes=shape.token_kv_bytes,
      embedding_bytes=round(shape.d_model * shape.dispatch_value_bytes),
    )
  itemsize = np.dtype(config.dtype).itemsize
  numbers = int(np.prod(cache_shape(config, steps)))
  return ModelFacts(
    vocab_size=config.vocab_size,
    n_experts=config.n_experts,
    top_k=config.top_k,
    moe_layers=config.moe_layers,
    expert_bytes=expert_bytes(config),
    dense_bytes=dense_bytes(config),
    token_kv_bytes=numbers * itemsize // (steps.rows * steps.cache_len),
    embedding_bytes=config.d_model * itemsize,
  )
