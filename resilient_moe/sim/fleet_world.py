"""What is true of a group: its view, its devices, and the load that it serves.

Time passes here and nowhere else; between two moments load advances in closed
form.
"""

from typing import Any

import numpy as np

from resilient_moe.recovery.effects import lose
from resilient_moe.recovery.view import ClusterView, Role, Status
from resilient_moe.sim import fleet_actions
from resilient_moe.sim.arrivals import MINUTE_S
from resilient_moe.sim.fleet_faults import Slow
from resilient_moe.sim.fleet_queue import Queue
from resilient_moe.sim.fleet_requests import Seated, in_decode
from resilient_moe.sim.fleet_service import Service
from resilient_moe.sim.fleet_setting import Setting, Template
from resilient_moe.sim.fleet_tally import Tally

RETURN = "return"  # the cause of a restart that brings devices back
_TURNS = 4  # stalls that stand for those of requests that go on in turn
_SAME = 1e-3  # capacities that differ by less are one


class World:
  """A group in time."""

  def __init__(
    self, setting: Setting, prepared: Template, number: int,
    rng: np.random.Generator,
  ) -> None:  # fmt: skip
    self.setting, self.prepared, self.number = setting, prepared, number
    self.t_s = 0.0
    self.view = prepared.view
    self.healthy = prepared.service.capacity
    self._service, self._seen = prepared.service, prepared.view
    self._mean_rate = float(np.mean(setting.demand.rate_per_s))
    self._none = False
    self.queue = Queue(setting.demand, self.healthy, prepared.healthy)
    self.tally = Tally()
    self.record: dict[str, Any] = {}  # of the recovery that is under way
    self.back: dict[int, float] = {}  # rank -> when its place has a device
    self.slow: dict[int, Slow] = {}
    self.stopped_s: float | None = None  # since when requests are stopped
    self.stopped = 0.0  # requests
    self.share = 1.0  # of the capacity that serves on meanwhile
    # Who waits for longer than the others (or less, below 0): requests, s.
    self.turns: list[tuple[float, float]] = []
    self._rng = rng

  def advance(self, t_s: float) -> None:
    """Nothing but load until `t_s`."""
    if t_s > self.t_s:
      self._serve()
      capacity = self.queue.capacity
      self.tally.pass_s(t_s - self.t_s, capacity, self.healthy)
      self.queue.advance(t_s)
      self.t_s = t_s

  def serve(self, none: bool) -> None:
    """From now on the state serves; `none`: nobody does."""
    self._none = none

  def _serve(self) -> None:
    """Sets the capacity that follows from the state."""
    if self._none or self.share <= 0:
      self.queue.set(0.0)
      return
    service = self._service_now().slowed(self._slowdown())
    capacity = service.capacity * self.share
    if abs(capacity - self.healthy) < _SAME * self.healthy:
      capacity = self.healthy
    gap_s = service.step_at(service.running(self._mean_rate))
    self.queue.set(capacity, gap_s <= self.setting.shape.tbt_slo_s)

  def _slowdown(self) -> float:
    """Of the slowest rank that steps with the others."""
    serves = self.view.status == Status.SERVING
    return max(
      (s.slowdown for r, s in self.slow.items() if serves[r]), default=1.0
    )

  def _service_now(self) -> Service:
    """What the view serves; asked for only when it does for a while."""
    view, seen = self.view, self._seen
    if not fleet_actions.serves_alike(seen, view):
      self._service = self.setting.service(view, self.prepared)
      self._seen = view
    return self._service

  def missing(self) -> list[int]:
    """Ranks whose places are empty now."""
    return sorted(r for r, back in self.back.items() if back > self.t_s)

  # -- requests

  def rows(self) -> float:
    """Rows of a rank that decode now."""
    if not self.queue.calm:
      return self._service_now().running(np.inf)
    minute = int(self.t_s // MINUTE_S)
    return self._service_now().running(self.queue.demand.at(minute))

  def running(self) -> float:
    """Requests that decode now."""
    return self.rows() * self._service_now().ranks

  def seat(self) -> ClusterView:
    """The view with the requests of this moment, which it keeps."""
    seated = Seated(self.rows(), self.prepared.standing.checkpoint)
    load = self.setting.load
    self.view = in_decode(self.view, load, seated, self._rng)
    return self.view

  def stop(self, share: float) -> None:
    """Requests stop until `go_on`, but for `share` of them."""
    if self.stopped_s is None:
      self.stopped_s = self.t_s
      self.seat()
    self.share = min(self.share, share)
    running = len(self.view.requests.request_id)
    self.stopped = max(self.stopped, (1 - self.share) * running)

  def wait_in_turn(
    self, requests: float, turns: float, late_s: float, within: bool = False
  ) -> None:
    """So many of the stopped requests go on one after the other.

    The last of a rank's `turns` does `late_s` after everybody else; `within`:
    when everybody does.
    """
    if not requests or not late_s:
      return
    n = int(np.clip(round(turns), 1, _TURNS))
    for turn in range(1, n + 1):
      after_s = late_s * turn / n - late_s * within
      self.turns.append((requests / n, after_s))

  def go_on(self) -> None:
    """Stopped requests have their next token."""
    if self.stopped_s is None:
      return
    stall_s = self.t_s - self.stopped_s
    planned = self.record.get("cause") == RETURN
    in_turn = sum(requests for requests, _ in self.turns)
    self.stall(stall_s, self.stopped - in_turn, planned)
    for requests, more_s in self.turns:
      self.stall(max(stall_s + more_s, 0.0), requests, planned)
    self.turns.clear()
    self.record["stall_s"] = stall_s
    self.record["stopped"] = round(self.stopped)
    self.stopped_s, self.stopped, self.share = None, 0.0, 1.0

  def stall(
    self, seconds: float, requests: float, planned: bool = False
  ) -> None:
    """So many requests had no token for so long; some are too slow now."""
    if requests <= 0:
      return
    kept = self.tally.pauses if planned else self.tally.stalls
    kept.append((seconds, requests))
    step_s = self._service_now().step_at(self.rows())
    spare_s = self.setting.shape.tbt_slo_s - step_s
    # A request is too slow if its tokens are too few to make up for it.
    limit = seconds / spare_s if spare_s > 0 else np.inf
    part, tokens = self.setting.load.generated_below(limit)
    self.tally.late_requests += requests * part
    self.tally.late_tokens += requests * tokens

  def serves_on(self, struck: list[int]) -> float:
    """The part of the load that doesn't wait for `struck` ranks.

    Where roles are apart an attention rank takes its own requests only, and
    an expert rank nothing whose experts all have copies elsewhere: senders
    turn to those by themselves. A collocated group steps as one.
    """
    view = self.view
    if not struck:
      return 1.0
    if not view.disaggregated:
      return 0.0
    left = lose(view, struck)
    if (left.table.copies() == 0)[~left.masked].any():
      return 0.0
    attend = (view.role[view.mesh] == Role.ATTENTION).sum()
    gone = (view.role[struck] == Role.ATTENTION).sum()
    return float(1 - gone / max(attend, 1))

  # -- records

  def begin_record(self, cause: str) -> None:
    """A recovery, one line of `events.jsonl`."""
    self.close_record()
    self.record = {
      "t_s": self.t_s, "group": self.number, "cause": cause, "ranks": [],
    }  # fmt: skip

  def close_record(self) -> None:
    """All of it is done; or the run is."""
    if self.record:
      self.record["redundancy_s"] = self.t_s - self.record["t_s"]
      self.tally.records.append(self.record)
      self.record = {}
