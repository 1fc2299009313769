"""Timing from a cost model of hardware: what no run of ours has measured.

`Costs` says what steps and actions take on a device; what it doesn't say
(detection, the serve loop, the policy's own time) are fields here, and
`note` names them. Prefill is left to the steps.
"""

import dataclasses

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.price import Hardware
from resilient_moe.recovery.view import ClusterView, Tier, absent
from resilient_moe.serving.backend import Placed
from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.sim.cost_model import Costs, StepLoad
from resilient_moe.sim.timing import Spent


@dataclasses.dataclass(frozen=True)
class RooflineTiming:
  """A `sim.timing.Timing` over `Costs`.

  Attributes:
    what: device and model, in words.
    detect: seconds from a loss to its report.
    plan: seconds that a policy takes.
    turn_s: of the serve loop, between two steps.
    heal, link: seconds until an attention rank asks elsewhere.
  """

  costs: Costs
  what: str
  detect: float = 0.02
  plan: float = 0.005
  turn_s: float = 2e-4
  heal: float = 0.03
  link: float = 0.5
  behind: bool = True

  @property
  def note(self) -> str:
    return (
      f"not calibrated: roofline of {self.what}; assumed: detection "
      f"{self.detect:g} s, a plan {self.plan:g} s, the loop {self.turn_s:g} s "
      "a turn"
    )

  def step_s(self, batch: StepBatch, view: ClusterView) -> float:
    return self.costs.step_s(view, load_of(batch))

  def after_resume_s(self, batch: StepBatch) -> float:
    return 0.0

  def action(
    self, action: act.Action, view: ClusterView, placed: tuple[Placed, ...]
  ) -> Spent:
    if isinstance(action, act.RecomputePrefix):
      return Spent(self.costs.hardware(view).requeue_s)
    if isinstance(action, act.LaunchRank):
      return Spent(self.costs.hardware(view).fence_s)  # it starts behind
    if isinstance(action, act.RestoreKV):
      return self._restore(action, view, placed)
    cost = self.costs.price(action, view)
    if isinstance(action, act.CopyExperts):
      return Spent(cost.seconds, {str(action.tier): cost.bytes})
    return Spent(cost.seconds)

  def _restore(
    self, action: act.RestoreKV, view: ClusterView,
    placed: tuple[Placed, ...],
  ) -> Spent:  # fmt: skip
    """The busiest rank's KV over its link; a store serves all in turn."""
    hardware = self.costs.hardware(view)
    sizes = [p.live_tokens * view.token_kv_bytes for p in placed]
    to = np.array([p.rank for p in placed], np.int64)
    shared = action.tier in (Tier.STORE, Tier.DISK)
    most = sum(sizes) if shared else float(np.bincount(to, sizes).max())
    seconds = hardware.copy_latency_s + most / _rate(hardware, action.tier)
    return Spent(seconds, {str(action.tier): sum(sizes)})

  def plan_s(self, policy: str) -> float:
    return self.plan

  def detect_s(self, kind: str, draw: float) -> float:
    return self.detect

  def strike(self, draw: float) -> float:
    return draw

  def mesh_ready_s(self, size: int, view: ClusterView) -> float:
    return self.costs.hardware(view).compile_s

  def launch_s(self, rank: int, view: ClusterView) -> float:
    return self.costs.hardware(view).process_start_s

  def checkpoint_lag_s(self, positions: int, view: ClusterView) -> float:
    hardware = self.costs.hardware(view)
    nbytes = positions * view.token_kv_bytes
    return hardware.copy_latency_s + nbytes / hardware.peer_bytes_per_s

  def heal_s(self, view: ClusterView) -> float:
    return self.heal

  def link_s(self, view: ClusterView) -> float:
    return self.link

  def start(
    self, view: ClusterView, generation: int, cache: bool
  ) -> tuple[tuple[str, float], ...]:
    """Process, programs, and the rest of a restart's price: weights."""
    hardware = self.costs.hardware(view)
    action = act.RestartInstance(tuple(view.mesh.tolist()), cache)
    if cache:  # its price must not hold what compiling takes
      name = absent(view.launched, view.mesh)
      view = dataclasses.replace(view, cached=view.cached | {name})
    whole = self.costs.price(action, view).seconds
    programs = hardware.load_executable_s if cache else hardware.compile_s
    rest = whole - hardware.process_start_s - programs
    return (
      ("spawn", hardware.process_start_s), ("weights", max(rest, 0.0)),
      ("executables", programs),
    )  # fmt: skip


def _rate(hardware: Hardware, tier: Tier) -> float:
  return float(getattr(hardware, f"{tier.value}_bytes_per_s"))


def load_of(batch: StepBatch) -> StepLoad:
  """What a step computes, by its ranks."""
  n = len(batch.mesh)
  rows, context, chunk, attended = (np.zeros(n) for _ in range(4))
  for r in batch.rows:
    rows[r.place] += 1
    context[r.place] += r.position + 1
  for c in batch.chunks:
    chunk[c.place] += c.length
    # Each token attends to all before it and to itself.
    attended[c.place] += c.length * (c.start + (c.length + 1) / 2)
  ranks = np.array(batch.mesh, np.int64)
  return StepLoad(ranks, rows, context, chunk, attended)

