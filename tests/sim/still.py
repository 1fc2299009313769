"""Simulated cases and timings for tests."""

import dataclasses
from typing import Any

from resilient_moe import recovery as rm
from resilient_moe.faults import Schedule
from resilient_moe.report import History
from resilient_moe.serving.backend import Placed
from resilient_moe.serving.request import Request as Request
from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.sim.case import ModelFacts, SimulatedCase
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.run import Run
from resilient_moe.sim.timing import Spent

MODEL = ModelFacts(
  vocab_size=256, n_experts=8, top_k=2, moe_layers=2, expert_bytes=4096,
  dense_bytes=8192, token_kv_bytes=128, embedding_bytes=64,
)  # fmt: skip
RANKS = 4


@dataclasses.dataclass(frozen=True)
class Fixed:
  """A `sim.timing.Timing` whose times are what a test says, in seconds."""

  step: float = 1.0
  turn_s: float = 0.0
  act: float = 0.0
  plan: float = 0.0
  detect: float = 0.0
  struck: float | None = 1.0  # part of a step; None: drawn
  ready: float = 0.0
  launch: float = 0.0
  lag: float = 0.0
  heal: float = 0.0
  link: float = 0.0
  begin: float = 0.0
  behind: bool = False
  note: str = "fixed times of a test"

  def step_s(self, batch: StepBatch, view: rm.ClusterView) -> float:
    return self.step

  def after_resume_s(self, batch: StepBatch) -> float:
    return 0.0

  def action(
    self, action: rm.Action, view: rm.ClusterView, placed: tuple[Placed, ...]
  ) -> Spent:
    return Spent(self.act)

  def plan_s(self, policy: str) -> float:
    return self.plan

  def detect_s(self, kind: str, draw: float) -> float:
    return self.detect

  def strike(self, draw: float) -> float:
    return draw if self.struck is None else self.struck

  def mesh_ready_s(self, size: int, view: rm.ClusterView) -> float:
    return self.ready

  def launch_s(self, rank: int, view: rm.ClusterView) -> float:
    return self.launch

  def checkpoint_lag_s(self, positions: int, view: rm.ClusterView) -> float:
    return self.lag

  def heal_s(self, view: rm.ClusterView) -> float:
    return self.heal

  def link_s(self, view: rm.ClusterView) -> float:
    return self.link

  def start(
    self, view: rm.ClusterView, generation: int, cache: bool
  ) -> tuple[tuple[str, float], ...]:
    return (("start", self.begin),)


STILL = Fixed()  # nothing but steps takes time
# Every wait is some odd part of a step.
BUSY = Fixed(
  step=0.011, turn_s=0.0003, act=0.0043, plan=0.0021, detect=0.0171,
  struck=None, ready=0.23, launch=0.31, lag=0.0137, heal=0.0041, link=0.05,
  begin=1.3, behind=True,
)  # fmt: skip


def requests(n: int = 10, new_tokens: int = 24) -> tuple[Request, ...]:
  """As `tests/runtime/harness.py: make_requests`: some there, some come."""
  return tuple(
    Request(
      request_id=f"r{i}",
      prompt=tuple((7 * i + j) % 64 for j in range(5 + 4 * i)),
      max_new_tokens=new_tokens + i % 3,
      seed=i,
      temperature=0.8 * (i > 3),
      arrival_step=0 if i < n - 4 else 6 * (i - n + 5),
    )
    for i in range(n)
  )


def case(
  policy: str, faults: Schedule = (), *, kwargs: dict | None = None,
  **fields: Any,
) -> SimulatedCase:  # fmt: skip
  """A small case; `fields` replace its defaults."""
  given: dict[str, Any] = {
    "name": policy, "policy": rm.load(policy, **(kwargs or {})),
    "scenario": "test", "seed": 0, "deployment": "collocated",
    "ranks": RANKS, "attention": 0, "model": MODEL, "rows": 2, "chunk": 16,
    "max_len": 96, "cache_len": 96, "requests": requests(), "faults": faults,
  }  # fmt: skip
  return SimulatedCase(**{**given, **fields})


def simulate(made: SimulatedCase, timing: Any = STILL) -> History:
  """The history of a run."""
  clock = VirtualClock()
  history = History(clock.now)
  Run(made, timing, clock, history).run()
  return history
