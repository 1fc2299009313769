"""The data of a timeline: what happened around the fault, by policy."""

import dataclasses

import numpy as np

from resilient_moe.report import phases as phases_lib
from resilient_moe.report import runs as runs_lib
from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.history import Event, of_kind

# What an action works on: few enough kinds to tell apart in print.
DECIDE = "detect, plan"
KINDS = {
    "Fence": "mesh, programs",
    "RebuildMesh": "mesh, programs",
    "FetchExecutable": "mesh, programs",
    "SwitchRole": "mesh, programs",
    "CopyExperts": "experts",
    "RemapExperts": "experts",
    "MaskExperts": "experts",
    "RestoreKV": "requests",
    "RecomputePrefix": "requests",
    "Requeue": "requests",
    "FailRequests": "requests",
    "RestartInstance": "restart, launch",
    "LaunchRank": "restart, launch",
    "Rejoin": "restart, launch",
}
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Span:
  """An action, in seconds since the first fault."""

  start_s: float
  seconds: float
  kind: str
  repair: bool


@dataclasses.dataclass(frozen=True)
class Curve:
  """One policy's run; all times in seconds since the first fault.

  Attributes:
    policy: its name.
    failed: why the run doesn't count; empty if it does.
    tokens: cumulative tokens at `times_s`, to be interpolated.
    faults_s: the faults, the first at 0.
    stages: (name, time) of plan ready, resumed, redundancy restored.
    recovered_s: until all affected answers go on; 0 if nothing tells.
  """

  policy: str
  failed: tuple[str, ...]
  times_s: np.ndarray  # [N]
  tokens: np.ndarray  # [N]
  faults_s: tuple[float, ...]
  stages: tuple[tuple[str, float], ...]
  spans: tuple[Span, ...]
  recovered_s: float
  step_s: float

  def rate(self, edges_s: np.ndarray) -> np.ndarray:
    """Tokens per second in the bins between `edges_s` [M] -> [M - 1]."""
    inside = np.interp(edges_s, self.times_s, self.tokens)
    return np.diff(inside) / np.diff(edges_s)


def cumulative(
    events: list[Event], zero_s: float
) -> tuple[np.ndarray, np.ndarray]:
  """Times since `zero_s` and the tokens emitted by then.

  A step's tokens are spread over the step, so that bins that don't fit a
  whole number of steps show no ripple, and over no more than the step, so
  that a stall shows as zero.
  """
  times: list[float] = []
  tokens: list[float] = []
  total = 0.0
  last = -np.inf
  for event in of_kind(events, "step"):
    if event["emitted"]:
      start = max(last, event["t"] - event["seconds"])
      times += [start - zero_s, event["t"] - zero_s]
      tokens += [total, total + len(event["emitted"])]
      total, last = tokens[-1], event["t"]
  return np.asarray(times or [0.0]), np.asarray(tokens or [0.0])


def _spans(events: list[Event], zero_s: float) -> tuple[Span, ...]:
  spans = [
      Span(p.fault_s - zero_s, p.plan_s - p.fault_s, DECIDE, False)
      for p in phases_lib.recovery_phases(events)
      if p.plan_s is not None
  ]
  spans += [
      Span(
          event["t"] - event["seconds"] - zero_s,
          event["seconds"],
          KINDS.get(event["name"], OTHER),
          event["part"] == "repair",
      )
      for event in of_kind(events, "action")
  ]
  return tuple(spans)


def _stages(
    events: list[Event], zero_s: float
) -> tuple[tuple[str, float], ...]:
  found = [
      (name, time - zero_s)
      for phase in phases_lib.recovery_phases(events)
      for name, time in (
          ("plan ready", phase.plan_s),
          ("first token of a paused request", phase.first_s),
          ("redundancy restored", phase.redundant_s),
      )
      if time is not None
  ]
  # Two faults can share a plan or a repair.
  return tuple(dict.fromkeys(found))


def curve(run: runs_lib.Run) -> Curve | None:
  """The curve of a run; None if no fault happened in it."""
  faults = [event["t"] for event in of_kind(run.events, "fault")]
  if not faults:
    return None
  zero_s = faults[0]
  times, tokens = cumulative(run.events, zero_s)
  quiet = stalls_lib.before_faults(run.events)
  return Curve(
      run.policy,
      () if run.valid else tuple(run.verdict.get("failed", ())) or ("?",),
      times,
      tokens,
      tuple(fault - zero_s for fault in faults),
      _stages(run.events, zero_s),
      _spans(run.events, zero_s),
      phases_lib.recovery_time_s(run.events) or 0.0,
      stalls_lib.median(stalls_lib.step_samples(quiet)) or 0.0,
  )


def _extent(curve: Curve) -> float:
  """Seconds from the first fault until there is nothing more to see."""
  last = max(curve.recovered_s, curve.faults_s[-1] + curve.step_s)
  # Repairs may take for ever behind traffic; a glimpse of them is enough.
  later = [t for _, t in curve.stages if t < 3 * last]
  return max(last, *later, 0.0)


def windows(curves: list[Curve]) -> list[tuple[float, float]]:
  """The stretches of time to draw: a close-up, if one is needed, and all.

  A restart takes so much longer than the rest that on its scale nothing of
  the others can be seen.
  """
  spans = sorted(_extent(c) for c in curves if not c.failed)
  if not spans:
    return [(-1.0, 1.0)]
  found = [spans[-1]]
  smaller = [span for span in spans if span < spans[-1] / 4]
  if smaller:
    found.insert(0, smaller[-1])
  step_s = max(c.step_s for c in curves)
  widths = [max(1.2 * span, 10 * step_s) for span in found]
  return [(-0.12 * width, width) for width in widths]
