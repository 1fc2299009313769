"""What the serve loop asks of a backend: three duties and a poll."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from resilient_moe.recovery.actions import Action
from resilient_moe.recovery.failures import Failure
from resilient_moe.recovery.view import ClusterView
from resilient_moe.serving.scheduler import StepBatch


class StepAborted(Exception):
  """The step failed on somebody: nothing of it counts. `poll` says why."""


class Stepwise:
  """`begin` and `finished` of a backend that steps while it is called."""

  _begun: tuple[StepBatch, ...] = ()

  def step(self, batch: StepBatch) -> np.ndarray:
    """Computes, waits, agrees, commits: sampled tokens [R, B + 1] int32.

    Raises:
      StepAborted: the step doesn't count; no state has changed.
    """
    raise NotImplementedError

  def call_meanwhile(self, meanwhile: Callable[[], None]) -> None:
    """Nobody else steps while an action is done."""

  def begin(self, batch: StepBatch) -> None:
    self._begun += (batch,)

  def finished(self, wait_s: float) -> list["Stepped"]:
    """One of the steps that were begun, first come first served."""
    del wait_s
    if not self._begun:
      return []
    batch, *rest = self._begun
    self._begun = tuple(rest)
    try:
      return [Stepped(batch, self.step(batch))]
    except StepAborted:
      return [Stepped(batch, None)]


class Stepped(NamedTuple):
  """How a step ended: sampled tokens [R, B + 1] int32; None: it failed."""

  batch: StepBatch
  tokens: np.ndarray | None


class Placed(NamedTuple):
  """A request whose KV a backend puts into a row."""

  request_id: str
  from_rank: int  # where it sat; -1: nowhere
  from_row: int
  rank: int
  row: int
  live_tokens: int  # positions its old row holds


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What executing an action came to."""

  detail: str = "done"  # for the history: warm, stored, compiled, ...
  nbytes: int = 0  # bytes moved
  tier: str = ""  # where they came from
  restored: Mapping[str, int] = dataclasses.field(default_factory=dict)
  # request -> positions of KV that its new row holds


class Backend(Protocol):
  """One engine's devices: emulated, processes, or simulated."""

  def view(self) -> ClusterView:
    """What there is, as facts; without the requests, which the loop knows."""

  def checkpoints(self) -> Mapping[str, tuple[int, int]]:
    """Request -> (positions committed, rank that holds them; -1: host)."""

  def domains(self) -> tuple[tuple[int, ...], ...]:
    """Ranks that step together, and apart from the others, in mesh order."""

  def call_meanwhile(self, meanwhile: Callable[[], None]) -> None:
    """What to call again and again while an action is waited for.

    It takes in steps that end, and begins the next ones of their domains.
    """

  def begin(self, batch: StepBatch) -> None:
    """Starts a step of a domain; one at a time each."""

  def finished(self, wait_s: float) -> list[Stepped]:
    """Steps that have ended: computed, agreed, committed; or failed.

    A failed one has changed no state; `poll` says why. Waits for the first at
    most `wait_s`.
    """

  def execute(self, action: Action, placed: tuple[Placed, ...]) -> Outcome:
    """Does an action on real arrays."""

  def ready_for(self, action: Action) -> bool:
    """Whether an action of a repair can be executed without a long wait.

    False: what it needs (a process that starts, a program that is compiled,
    a mesh that is made ready) is on its way behind traffic; ask again.
    """

  def poll(
    self, recovery_actions: int | None = None, repairing: bool = False
  ) -> tuple[Failure, ...]:
    """Failures detected since the last poll; a moment for background work.

    `recovery_actions`: how many actions of the present recovery are done.
    `repairing`: a repair goes on behind traffic.
    """

  def background_done(self) -> bool:
    """Whether nothing is left to do behind traffic."""
