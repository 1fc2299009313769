"""One group's month: membership by event, load in closed form between.

Each change of membership builds the real view, asks the real policy, prices
its plan and applies it (`fleet_carry`):

  fault -> detected -> plan -> resume, action by action -> serves on
                                  -> repair, action by action, behind traffic

A failure on the way abandons the plan and asks again with the view as it is.
What the policy can't do is left to a restart of whoever is left; with too few
of them the group is down until devices come back. Devices that come back
without the policy's doing (it launches no replacements) stand by where the
mesh is whole; else they are used by the next restart, which comes by itself
once they are a part of the group that is worth it (`Setting.restart_part`).
"""

import dataclasses
import heapq
import itertools
from typing import Any

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.effects import lose, sealed
from resilient_moe.recovery.failures import RanksLost, Straggler
from resilient_moe.recovery.growth import next_meshes
from resilient_moe.recovery.packing import slots_needed
from resilient_moe.recovery.plan import Plan
from resilient_moe.recovery.policy import Infeasible, RecoveryPolicy
from resilient_moe.recovery.view import Role, Status, absent, mesh_named
from resilient_moe.sim.fleet_carry import Carrier, restarts
from resilient_moe.sim.fleet_faults import Slow, Strike
from resilient_moe.sim.fleet_setting import Setting, Template
from resilient_moe.sim.fleet_tally import Tally
from resilient_moe.sim.fleet_world import RETURN, World


class Group:
  """A group, from its start on."""

  def __init__(
    self, setting: Setting, prepared: Template, number: int,
    rng: np.random.Generator,
  ) -> None:  # fmt: skip
    self._world = World(setting, prepared, number, rng)
    self._carrier = Carrier(self._world)
    self._setting = setting
    self._events: list[tuple[float, int, str, Any]] = []
    self._order = itertools.count()
    self._lost: set[int] = set()  # dead, and no plan was made for it yet
    self._report = -1  # the event that reports them
    self._down = False

  def run(
    self, strikes: list[Strike], slows: list[Slow], until_s: float
  ) -> Tally:
    """All that happens up to `until_s`."""
    world = self._world
    for strike in strikes:
      self._at(strike.t_s, "strike", strike)
    for slow in slows:
      self._at(slow.t_s, "slow", slow)
    while self._events and self._events[0][0] < until_s:
      if self._work(self._events[0][0]):
        continue  # and perhaps an earlier event
      t, number, kind, what = heapq.heappop(self._events)
      world.advance(t)
      getattr(self, f"_on_{kind}")(number, what)
      world.serve(self._down or self._carrier.pauses)
    while self._work(until_s):
      pass
    world.advance(until_s)
    world.close_record()
    world.tally.counts = world.queue.finish()
    return world.tally

  def _at(self, t_s: float, kind: str, what: Any) -> int:
    number = next(self._order)
    heapq.heappush(
      self._events, (max(t_s, self._world.t_s), number, kind, what)
    )
    return number

  def _work(self, limit_s: float) -> bool:
    """Carries the plan on; whether it ended, and what then follows is begun."""
    ended = self._carrier.work(limit_s)
    if ended:
      self._regrow()
      self._world.serve(self._down)
    return ended

  # -- what happens

  def _on_strike(self, number: int, strike: Strike) -> None:
    del number
    world = self._world
    for rank, back_s in zip(strike.ranks, strike.back_s, strict=True):
      world.back[rank] = back_s
      world.slow.pop(rank, None)
      self._carrier.lose(rank)
      self._at(back_s, "back", rank)
    if self._down:
      return
    status = world.view.status
    known = {r for r in strike.ranks if status[r] == Status.LOST} | self._lost
    there = [r for r in strike.ranks if r not in known]
    if not there:
      return
    world.tally.failures += 1
    world.tally.ranks_lost += len(there)
    if not world.record:
      world.begin_record(strike.domain)
    elif world.record.get("cause") == RETURN:  # no longer as planned
      world.record["cause"] = strike.domain
    world.record["ranks"] = world.record["ranks"] + there
    serve = [r for r in there if status[r] == Status.SERVING]
    if serve:
      world.stop(world.serves_on(serve))
    self._carrier.abandon()
    self._lost |= set(there)
    self._report = self._at(world.t_s + self._setting.detect_s, "report", None)

  def _on_report(self, number: int, what: None) -> None:
    del what
    if number == self._report and not self._down:
      self._recover(RanksLost(tuple(sorted(self._lost))))

  def _on_slow(self, number: int, slow: Slow) -> None:
    del number
    if self._world.view.status[slow.rank] == Status.SERVING:
      self._world.slow[slow.rank] = slow
      self._at(slow.until_s, "unslow", slow)
      self._at(slow.t_s + self._setting.straggler_s, "straggler", slow)

  def _on_unslow(self, number: int, slow: Slow) -> None:
    del number
    if self._world.slow.get(slow.rank) is slow:
      del self._world.slow[slow.rank]

  def _on_straggler(self, number: int, slow: Slow) -> None:
    """It is reported; who is busy with a plan, or tolerates it, goes on."""
    del number
    world = self._world
    busy = self._carrier.busy or self._lost or self._down
    if busy or world.slow.get(slow.rank) is not slow:
      return
    failure = Straggler(slow.rank, slow.slowdown)
    plan = self._setting.policy.recover(world.seat(), failure)
    if isinstance(plan, Infeasible):
      return
    world.tally.drained += 1
    world.back[slow.rank] = slow.until_s
    self._at(slow.until_s, "back", slow.rank)
    world.begin_record("straggler")
    world.record["ranks"] = [slow.rank]
    self._carrier.begin(plan)

  def _on_back(self, number: int, rank: int) -> None:
    """A place has a device again; a plan that launches it waits for this."""
    del number
    if self._world.back.get(rank, 0.0) <= self._world.t_s:
      self._regrow()

  # -- recovery

  def _recover(self, failure: RanksLost) -> None:
    world, again = self._world, self._carrier.restarting
    self._lost.clear()
    if world.stopped_s is None:  # plans are made for who runs now
      world.seat()
    if again:  # what was starting has no plan but to start again
      self._restart_whole()
      return
    plan = self._plan(self._setting.policy, failure)
    if isinstance(plan, Infeasible):
      world.tally.fallbacks += 1
      world.record["fallback"] = plan.reason
      plan = self._plan(self._setting.fallback, failure)
    left, world.view = world.view, lose(world.view, failure.ranks)
    # A restart takes whatever is there: who only lost its process, too.
    if isinstance(plan, Infeasible) or (restarts(plan) and self._idle()):
      self._restart_whole()
      return
    world.view = left
    self._carrier.begin(plan)

  def _plan(
    self, policy: RecoveryPolicy, failure: RanksLost
  ) -> Plan | Infeasible:
    """What the policy says; a restart that doesn't fit is not feasible."""
    plan = policy.recover(self._world.view, failure)
    if isinstance(plan, Plan):
      for action in plan.resume:
        if isinstance(action, act.RestartInstance):
          reason = self._too_few(action.ranks)
          if reason:
            return Infeasible(reason)
    return plan

  def _too_few(self, ranks: tuple[int, ...]) -> str | None:
    """Why an instance on `ranks` has no memory to serve, else None."""
    world, view = self._world, self._world.view
    home = view.home[np.asarray(ranks, np.int64)]
    holders = int((home != Role.ATTENTION).sum())
    if not holders or not (home != Role.EXPERT).any():
      return f"{len(ranks)} ranks are left, and none of them for all roles"
    need = slots_needed(view.n_experts, holders)
    slots = max(need, world.prepared.view.slots_per_rank)
    if self._setting.rows(view, slots, world.prepared.standing) < 1:
      return f"{slots} experts a rank leave no memory for a request"
    return None

  # -- devices that come back

  def _idle(self) -> list[int]:
    """Ranks that the view has lost, though their places have devices."""
    world = self._world
    away = np.isin(world.view.status, (Status.LOST, Status.LAUNCHING))
    gone = np.append(world.missing(), sorted(self._lost)).astype(np.int64)
    return np.setdiff1d(np.flatnonzero(away), gone).tolist()

  def _regrow(self) -> None:
    """What to do with devices that no plan is going to launch."""
    world = self._world
    if self._carrier.busy or self._lost:
      return
    if self._down:
      self._restart_whole()
      return
    idle, view = self._idle(), world.view
    if not idle:
      return
    if len(view.mesh) == len(view.launched):
      self._stand_by(idle)
    elif len(idle) >= self._setting.restart_part * len(view.launched):
      world.tally.planned_restarts += 1
      world.begin_record(RETURN)
      self._restart_whole()

  def _stand_by(self, ranks: list[int]) -> None:
    """Devices that nobody needs now become spares, and know nothing."""
    view = self._world.view
    status = view.status.copy()
    status[ranks] = Status.SPARE
    ready = view.ready
    for rank in ranks:  # programs made for its predecessor are of no use
      first = rank in view.launched
      ready = frozenset(
        n for n in ready if (rank in n if first else ~rank not in n)
      )
    world = self._world
    world.view = dataclasses.replace(
      view, status=sealed(status, np.int8), ready=ready
    )
    if self._setting.policy.spares:  # which it needs programs for
      made = next_meshes(world.view, spares=True)
      world.begin_record(RETURN)
      self._carrier.begin(Plan((), made, ()))

  def _restart_whole(self) -> None:
    """Every device that is there starts afresh; down, if they are too few."""
    world, whole = self._world, self._world.prepared.view
    missing = world.missing()
    name = absent(whole.launched, np.setdiff1d(whole.mesh, missing))
    ranks = tuple(mesh_named(whole.launched, name).tolist())
    if world.stopped_s is None:
      world.stop(0.0)
    world.share = 0.0
    if self._too_few(ranks):
      world.tally.outages += not self._down
      world.record["down"] = True
      self._down = True
      return
    base = lose(whole, missing) if missing else whole
    # The programs of the whole mesh were stored when it was first started.
    cached = base.cached if missing else base.cached | {name}
    world.view = dataclasses.replace(
      base, epoch=world.view.epoch, requests=world.view.requests, cached=cached
    )
    self._down = False
    fence: tuple[act.Action, ...] = ()
    if missing:
      fence = (act.Fence(tuple(missing)),)
    restart = act.RestartInstance(ranks, not self._setting.cold)
    everyone = world.view.requests.request_id
    self._carrier.begin(Plan((*fence, restart), (), everyone))
