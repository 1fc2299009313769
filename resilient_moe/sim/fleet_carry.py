"""Carries a plan out in virtual time: `advance`, after what it costs.

Replacements start in the background, and what needs one waits for it; the
programs of a mesh that somebody joins are made ready before the pause. All
else is done one after the other, as the runtimes do it.
"""

import collections
import dataclasses

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import servable
from resilient_moe.recovery.effects import lose
from resilient_moe.recovery.plan import Plan, ordered
from resilient_moe.recovery.semantics import IllegalPlan, advance
from resilient_moe.recovery.view import ClusterView, Status, absent
from resilient_moe.sim import fleet_actions
from resilient_moe.sim.fleet_world import World

_PAUSES = (act.Rejoin, act.RestartInstance)
_PREFILLING = (act.RecomputePrefix, act.RestoreKV, act.RestartInstance)


@dataclasses.dataclass
class _Doing:
  """An action that is being carried out; None: what it needs is made ready."""

  part: str
  action: act.Action | None
  start_s: float
  end_s: float
  nbytes: int = 0
  pauses: bool = False


class Carrier:
  """The plan at hand, of one group."""

  def __init__(self, world: World) -> None:
    self._world = world
    self._todo: collections.deque[tuple[str, act.Action]] = collections.deque()
    self._doing: _Doing | None = None
    self._started: dict[int, float] = {}  # rank -> when its process runs
    self.restarting = False  # processes have ended and do not serve yet

  @property
  def busy(self) -> bool:
    """A plan is under way."""
    return bool(self._todo)

  @property
  def pauses(self) -> bool:
    """Nobody serves during what is done now."""
    return self._doing is not None and self._doing.pauses

  def begin(self, plan: Plan) -> None:
    """Takes a plan; its requests stop until it has resumed."""
    world = self._world
    world.tally.plans += 1
    world.turns.clear()
    self.restarting |= restarts(plan)
    running = int((world.view.requests.rank >= 0).sum())
    share = 1 - len(plan.paused) / running if running else 0.0
    resume, repair = ordered(plan.resume), ordered(plan.repair)
    if resume or world.stopped_s is not None:
      world.stop(share)
    self._todo = collections.deque(
      [("resume", a) for a in resume] + [("repair", a) for a in repair]
    )
    names = [type(action).__name__ for action in resume]
    world.record.setdefault("resume", []).append(names)
    if not resume:
      self._resumed()
    if not self._todo:
      world.close_record()

  def abandon(self) -> None:
    """A failure has replaced the plan: the rest of it is not done."""
    if self._todo:
      self._world.tally.abandoned += 1
      record = self._world.record
      record["abandoned"] = record.get("abandoned", 0) + 1
    self._todo.clear()
    self._doing = None

  def lose(self, rank: int) -> None:
    """A process that was starting has died."""
    self._started.pop(rank, None)

  def work(self, limit_s: float) -> bool:
    """Carries out what ends by `limit_s`; whether that ended the plan."""
    world = self._world
    while self._todo:
      if self._doing is None:
        start_s = max(world.t_s, self._available_s(self._todo[0][1]))
        if start_s >= limit_s:
          return False
        world.advance(start_s)
        self._doing = self._start(*self._todo[0])
        world.serve(self.pauses)
      if self._doing.end_s > limit_s:
        return False
      world.advance(self._doing.end_s)
      doing, self._doing = self._doing, None
      if doing.action is not None:
        self._finish(doing, doing.action)
        world.serve(False)
        if not self._todo:
          world.close_record()
          return True
    return False

  def _available_s(self, action: act.Action) -> float:
    """When the processes that an action needs are there."""
    if isinstance(action, act.Rejoin):
      return self._started.get(action.rank, 0.0)
    if isinstance(action, act.CopyExperts):
      ranks = {move.rank for move in action.moves}
      return max((self._started.get(r, 0.0) for r in ranks), default=0.0)
    return 0.0

  def _start(self, part: str, action: act.Action) -> _Doing:
    world = self._world
    costs, view, t = world.setting.costs, world.view, world.t_s
    cost = costs.price(action, view)
    if isinstance(action, act.LaunchRank):  # goes on in the background
      back_s = world.back.get(action.rank, 0.0)
      self._started[action.rank] = max(t, back_s) + cost.seconds
      return _Doing(part, action, t, t)
    if isinstance(action, act.Rejoin) and not view.disaggregated:
      name = absent(view.launched, [*view.mesh.tolist(), action.rank])
      if name not in view.ready:
        world.view = dataclasses.replace(view, ready=view.ready | {name})
        pause = costs.price(action, world.view)
        return _Doing(part, None, t, t + max(cost.seconds - pause.seconds, 0))
    pauses = part == "repair" and isinstance(action, _PAUSES)
    end_s = t + cost.seconds - self._prefilled_again(part, action)
    return _Doing(part, action, t, end_s, cost.bytes, pauses)

  def _prefilled_again(self, part: str, action: act.Action) -> float:
    """Seconds of an action of `resume` that service needn't wait for.

    Steps prefill who lost its KV beside those who decode, a rank's prompts
    one after the other. Behind a restart nobody is left to decode.
    """
    world = self._world
    if part != "resume" or not isinstance(action, _PREFILLING):
      return 0.0
    late_s = world.setting.costs.prefill_part_s(action, world.view)
    if isinstance(action, act.RestartInstance):
      requests = len(world.view.requests.rank)
      world.wait_in_turn(requests, requests / len(action.ranks), late_s, True)
      return 0.0
    most = np.bincount(action.to).max(initial=0)
    world.wait_in_turn(len(action.requests), most, late_s)
    return late_s

  def _finish(self, doing: _Doing, action: act.Action) -> None:
    """The action has been carried out."""
    world, before = self._world, self._world.view
    self._todo.popleft()
    fleet_actions.account(
      world.tally, world.record, before, action, doing.nbytes
    )
    fleet_actions.return_requests(world.queue, action)
    world.view = advance(before, action)
    if isinstance(action, act.RestartInstance):
      world.view = whole_again(world, action)
    if isinstance(action, act.Rejoin):
      self._started.pop(action.rank, None)
    if doing.pauses:
      world.stall(doing.end_s - doing.start_s, world.running(), planned=True)
    if doing.part == "resume" and (
      not self._todo or self._todo[0][0] != "resume"
    ):
      self._resumed()

  def _resumed(self) -> None:
    """Service goes on; a plan after which it can't is an error."""
    world = self._world
    reason = servable(world.view)
    if reason:
      raise IllegalPlan(
        f"group {world.number} at {world.t_s:.0f} s: after resume nothing can "
        f"be served: {reason}"
      )
    self.restarting = False
    world.go_on()


def restarts(plan: Plan) -> bool:
  """Whether all processes end before service goes on."""
  return any(isinstance(a, act.RestartInstance) for a in plan.resume)


def whole_again(world: World, action: act.RestartInstance) -> ClusterView:
  """The view after a restart; on all of its ranks it is as at the start."""
  whole, view = world.prepared.view, world.view
  if set(action.ranks) != set(whole.mesh.tolist()):
    return view
  away = [
    rank
    for rank in range(len(whole.status))
    if view.status[rank] in (Status.LOST, Status.LAUNCHING)
  ]
  fresh = lose(whole, away) if away else whole
  return dataclasses.replace(fresh, epoch=view.epoch, requests=view.requests)
