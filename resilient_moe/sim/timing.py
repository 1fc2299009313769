"""What a simulated engine asks about time: how long everything takes."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from resilient_moe.recovery.actions import Action
from resilient_moe.recovery.view import ClusterView
from resilient_moe.serving.backend import Placed
from resilient_moe.serving.scheduler import StepBatch

PART = "worker "  # a stage that is part of another one begins like this


class Spent(NamedTuple):
  """What an action takes: seconds, and bytes over each kind of link."""

  seconds: float = 0.0
  links: Mapping[str, int] = {}  # tier -> bytes

  @property
  def nbytes(self) -> int:
    return sum(self.links.values())


class Timing(Protocol):
  """Seconds of virtual time. No state: equal questions have equal answers.

  `draw` is a number in [0, 1) from the run's seed, for what is a matter of
  chance.
  """

  @property
  def note(self) -> str:
    """What the numbers were calibrated on, with the range; for tables."""

  @property
  def behind(self) -> bool:
    """Whether repairs have meshes and processes made ready behind traffic.

    So do real processes; else the action itself takes the time.
    """

  @property
  def turn_s(self) -> float:
    """What the serve loop needs between two steps or actions."""

  def step_s(self, batch: StepBatch, view: ClusterView) -> float:
    """A step of the domain `batch.mesh`."""

  def after_resume_s(self, batch: StepBatch) -> float:
    """What the first step behind a recovery takes longer than others."""

  def action(
    self, action: Action, view: ClusterView, placed: tuple[Placed, ...]
  ) -> Spent:
    """An action, done from `view`, which has no requests.

    Prefill of what is moved is not part of it: the steps do that.
    """

  def plan_s(self, policy: str) -> float:
    """A policy decides."""

  def detect_s(self, kind: str, draw: float) -> float:
    """From a fault (its kind) until its failure is reported."""

  def strike(self, draw: float) -> float:
    """Which part of a step has passed when a fault strikes in it, 0 to 1."""

  def mesh_ready_s(self, size: int, view: ClusterView) -> float:
    """A mesh of `size` ranks is made ready behind traffic."""

  def launch_s(self, rank: int, view: ClusterView) -> float:
    """A replacement process starts behind traffic, until it can be used."""

  def checkpoint_lag_s(self, positions: int, view: ClusterView) -> float:
    """A rank's committed positions are on their way to who keeps them."""

  def heal_s(self, view: ClusterView) -> float:
    """An attention rank finds an expert rank dead and asks another copy."""

  def link_s(self, view: ClusterView) -> float:
    """An attention rank judges a link to be lost."""

  def start(
    self, view: ClusterView, generation: int, cache: bool
  ) -> tuple[tuple[str, float], ...]:
    """The stages of an engine's start: name, seconds.

    One that begins with `PART` is part of another, and takes no more time.
    """
