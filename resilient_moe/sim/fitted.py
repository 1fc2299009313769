"""Timing from fitted numbers: what runs of one machine have taken.

`sim.fit` makes these numbers from histories. They hold for the model, the
shapes and the machine of those runs, which `note` names; beyond them they are
an extrapolation (`sim.roofline_timing` is made for that).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.view import ClusterView, Tier, absent
from resilient_moe.serving.backend import Placed
from resilient_moe.serving.scheduler import StepBatch
from resilient_moe.sim.timing import Spent

SHIPPED = pathlib.Path(__file__).parent / "calibrations"
ANY = "*"  # whatever has no number of its own
COLD = ("stored", "compiled")  # programs that have not run yet


@dataclasses.dataclass(frozen=True)
class StepFit:
  """Seconds of a step: a line in what it computes."""

  fixed: float
  per_rank: float  # of the mesh
  per_row: float  # that decodes
  per_token: float = 0.0  # that is prefilled

  def seconds(self, ranks: int, rows: int, tokens: int) -> float:
    line = self.fixed + self.per_rank * ranks + self.per_row * rows
    return max(line + self.per_token * tokens, 0.0)


@dataclasses.dataclass(frozen=True)
class ActionFit:
  """Seconds of an action: a line in its bytes."""

  fixed: float
  per_byte: float = 0.0


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A `sim.timing.Timing` of fitted numbers.

  Attributes:
    about: what was fitted: runtime, runs, steps, and the ranges (`note`).
    decode, prefill: steps without and with a prompt chunk.
    after_resume: what the first step behind a recovery takes longer, without
      and with a prompt chunk.
    actions: by NAME or NAME/KIND, where a kind is a tier or where programs
      come from; "*": any other.
    plan: by policy; "*": any other.
    detect: by kind of fault, equally likely delays; "*": any other.
    struck: which part of a step has passed when a fault strikes; None: drawn.
    starts: stages of an engine's start, by `first`, `stored`, `compiled`.
  """

  about: Mapping[str, Any]
  decode: StepFit
  prefill: StepFit
  turn_s: float
  after_resume: tuple[float, float]
  actions: Mapping[str, ActionFit]
  plan: Mapping[str, float]
  detect: Mapping[str, tuple[float, ...]]
  struck: float | None
  behind: bool
  mesh_ready: float
  launch: float
  lag: float
  heal: float
  link: float
  starts: Mapping[str, tuple[tuple[str, float], ...]]

  @property
  def note(self) -> str:
    a = self.about
    ranges = ", ".join(
      f"{name} {low} to {high}" if low != high else f"{name} {low}"
      for name, (low, high) in a["ranges"].items()
    )
    runs = f"{a['runs']} {a['runtime']} runs, {a['deployment']}"
    seen = f"{a['steps']} steps, {a['faults']} faults"
    off = a.get("held_out_error", {})
    in_steps = a.get("held_out_error_in_steps", {})
    text = f"calibrated on {runs} ({seen}) of {a['machine']}: {ranges}"
    if "rest" in a:
      kinds = ", ".join(a["rest"]["of"])
      text += f"; {kinds} by {a['rest']['runs']} other runs"
    if not off:
      return text
    said = ", ".join(
      f"{name} {error:.0%} ({in_steps[name]:.0%} in steps)"
      if name in in_steps else f"{name} {error:.0%}"
      for name, error in off.items()
    )  # fmt: skip
    return f"{text}; median error on held-out runs: {said}"

  def step_s(self, batch: StepBatch, view: ClusterView) -> float:
    fit = self.prefill if batch.chunks else self.decode
    rows, tokens = len(batch.rows), batch.prefill_tokens
    return fit.seconds(len(batch.mesh), rows, tokens)

  def after_resume_s(self, batch: StepBatch) -> float:
    return self.after_resume[bool(batch.chunks)]

  def action(
    self, action: act.Action, view: ClusterView, placed: tuple[Placed, ...]
  ) -> Spent:
    name, kind, nbytes = type(action).__name__, "", 0
    if isinstance(action, act.CopyExperts):
      kind = str(action.tier)
      nbytes = len(action.moves) * view.expert_bytes
    elif isinstance(action, act.RestoreKV):
      kind = str(action.tier)
      nbytes = sum(p.live_tokens for p in placed) * view.token_kv_bytes
    elif isinstance(action, act.FetchExecutable):
      kind = _source(action.absent, view)
    elif isinstance(action, act.Rejoin):
      mesh = [*view.mesh.tolist(), action.rank]
      kind = _source(absent(view.launched, mesh), view)
    fit = self._fit(name, kind)
    links = {kind: nbytes} if nbytes and kind in set(Tier) else {}
    return Spent(fit.fixed + fit.per_byte * nbytes, links)

  def _fit(self, name: str, kind: str) -> ActionFit:
    """An action's own numbers, else those of what is most like it."""
    kinds = [kind]
    if kind in COLD:  # cold is cold: far from warm, wherever it comes from
      kinds += [other for other in COLD if other != kind]
    for each in kinds:
      if f"{name}/{each}" in self.actions:
        return self.actions[f"{name}/{each}"]
    if kind in COLD and self.mesh_ready:  # the same work, in peacetime
      return ActionFit(self.mesh_ready)
    return self.actions.get(name, self.actions[ANY])

  def plan_s(self, policy: str) -> float:
    return self.plan.get(policy, self.plan[ANY])

  def detect_s(self, kind: str, draw: float) -> float:
    delays = self.detect.get(kind, self.detect[ANY])
    return delays[int(draw * len(delays))]

  def strike(self, draw: float) -> float:
    return draw if self.struck is None else self.struck

  def mesh_ready_s(self, size: int, view: ClusterView) -> float:
    return self.mesh_ready

  def launch_s(self, rank: int, view: ClusterView) -> float:
    return self.launch

  def checkpoint_lag_s(self, positions: int, view: ClusterView) -> float:
    return self.lag

  def heal_s(self, view: ClusterView) -> float:
    return self.heal

  def link_s(self, view: ClusterView) -> float:
    return self.link

  def start(
    self, view: ClusterView, generation: int, cache: bool
  ) -> tuple[tuple[str, float], ...]:
    if not generation:
      return self.starts["first"]
    return self.starts["stored" if cache else "compiled"]

  def with_rest_of(self, other: "Fitted") -> "Fitted":
    """What these runs have not shown is taken from other runs of the runtime.

    Actions and faults that only those had, and how long a launch takes.
    """
    actions = {n: f for n, f in other.actions.items() if n not in self.actions}
    detect = {k: d for k, d in other.detect.items() if k not in self.detect}
    taken = sorted({n.partition("/")[0] for n in actions} | set(detect))
    about = {**self.about, "rest": {"runs": other.about["runs"],
                                    "of": taken}}  # fmt: skip
    return dataclasses.replace(
      self, about=about, actions={**actions, **self.actions},
      detect={**detect, **self.detect}, launch=self.launch or other.launch,
    )  # fmt: skip

  # -- files

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def read(cls, name: str) -> "Fitted":
    """A calibration that ships, by name, or a file of `to_json`.

    Raises:
      ValueError: there is none, or it isn't one.
    """
    shipped = SHIPPED / f"{name}.json"
    path = shipped if shipped.is_file() else pathlib.Path(name)
    ships = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
    needed = f"needed is a file of experiments.calibrate, or one of: {ships}"
    try:
      text = path.read_text("utf-8")
    except OSError as error:
      raise ValueError(f"calibration {name!r}: {error}; {needed}") from error
    try:
      return cls._of(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f"calibration {name!r}: {type(error).__name__}: {error}; {needed}"
      ) from error

  @classmethod
  def _of(cls, fields: dict[str, Any]) -> "Fitted":
    tables = ("about", "actions", "plan", "detect", "starts")
    for name in tables:
      if not isinstance(fields[name], dict):
        raise ValueError(f"{name} is no table")
    given = {
      **fields,
      "decode": StepFit(**fields["decode"]),
      "prefill": StepFit(**fields["prefill"]),
      "after_resume": tuple(map(float, fields["after_resume"])),
      "actions": {n: ActionFit(**f) for n, f in fields["actions"].items()},
      "detect": {n: tuple(d) for n, d in fields["detect"].items()},
      "starts": {
        n: tuple((stage, s) for stage, s in stages)
        for n, stages in fields["starts"].items()
      },
    }
    return cls(**given)


def _source(name: frozenset[int], view: ClusterView) -> str:
  if name in view.ready or view.disaggregated:
    return "warm"
  return "stored" if name in view.cached else "compiled"

