"""A fleet of equal groups over weeks: one policy, one seed.

Faults are drawn for the whole fleet (`fleet_faults`); the groups that they
strike are followed one by one (`fleet_group`), the others are all alike and
are one computation. Work grows with faults and with struck groups, not with
steps or devices. Virtual time, one seed: equal results everywhere.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from resilient_moe.recovery.effects import sealed
from resilient_moe.recovery.failures import RanksLost
from resilient_moe.recovery.policy import Infeasible, RecoveryPolicy
from resilient_moe.recovery.start import bare_view
from resilient_moe.recovery.view import ClusterView
from resilient_moe.sim.arrivals import MINUTE_S, Load
from resilient_moe.sim.cost_model import Costs
from resilient_moe.sim.failure_rates import DAY_S, FailureModel
from resilient_moe.sim.fleet_carry import restarts
from resilient_moe.sim.fleet_faults import Layout, draw
from resilient_moe.sim.fleet_group import Group
from resilient_moe.sim.fleet_queue import Demand
from resilient_moe.sim.fleet_service import Service, prompt_steps
from resilient_moe.sim.fleet_setting import (
  Memory,
  Setting,
  Shape,
  Template,
  extra_bytes,
  template,
  with_healthy,
)
from resilient_moe.sim.fleet_tally import Tally

_FAULTS, _GROUP = 0, 1  # streams of a seed


@dataclasses.dataclass(frozen=True)
class Model:
  """What a view needs to know of a model."""

  n_experts: int
  top_k: int
  expert_bytes: int
  token_kv_bytes: int


@dataclasses.dataclass(frozen=True)
class Study:
  """A fleet, what strikes it and what it promises; all but policy and seed."""

  model: Model
  memory: Memory
  shape: Shape
  failures: FailureModel
  groups: int
  ranks: int  # of a group, spares apart
  attention: int = 0  # of them, those that only attend; 0: all do both
  devices_per_host: int = 8
  hosts_per_rack: int = 4
  days: float = 30.0
  utilisation: float = 0.7  # load over the capacity without redundancy
  ttft_slo_s: float = 5.0
  patience_s: float = 60.0  # clients that wait for longer leave
  detect_s: float = 1.0
  straggler_s: float = 60.0
  restart_part: float = 0.0

  def __post_init__(self) -> None:
    for name, low in (
      ("groups", 1), ("ranks", 2), ("attention", 0), ("days", 0),
      ("utilisation", 0), ("patience_s", 0), ("detect_s", 0),
    ):  # fmt: skip
      value = getattr(self, name)
      if not value >= low:
        raise ValueError(f"{name}={value}: at least {low}")
    if self.attention >= self.ranks:
      raise ValueError(
        f"attention={self.attention}: at most {self.ranks - 1} of "
        f"{self.ranks} ranks"
      )

  @property
  def devices(self) -> int:
    """Those that serve; a policy's spares come on top."""
    return self.groups * self.ranks


@dataclasses.dataclass(frozen=True)
class Result:
  """One run: its numbers, and a line for each recovery."""

  sample: dict[str, Any]
  records: list[dict[str, Any]]


def bare(study: Study, spares: int, offset: int = 0) -> ClusterView:
  """A group before its policy prepares it.

  `offset`: how many hosts of its first rack belong to another group.
  """
  model = study.model
  view = bare_view(
    study.ranks,
    model.n_experts,
    spares=spares,
    top_k=model.top_k,
    ranks_per_host=study.devices_per_host,
    hosts_per_rack=study.hosts_per_rack,
    expert_bytes=model.expert_bytes,
    token_kv_bytes=model.token_kv_bytes,
    attention=study.attention,
  )
  rack = (view.host + offset) // study.hosts_per_rack
  return dataclasses.replace(view, rack=sealed(rack, np.int32))


def simulate(
  study: Study,
  policy: RecoveryPolicy,
  bare_policy: RecoveryPolicy,
  fallback: RecoveryPolicy,
  costs: Costs,
  load: Load,
  seed: int,
) -> Result:
  """Runs a fleet under one policy.

  Args:
    study: the fleet.
    policy: who recovers.
    bare_policy: without any redundancy: its capacity is what load and the
      cost of redundancy are measured by (`none`).
    fallback: a restart, for what `policy` has no plan for.
    costs: how long steps and actions take.
    load: the requests of each group.
    seed: of faults and of the requests that they catch.

  Returns:
    Numbers of the whole fleet, and its recoveries.
  """
  make = functools.partial(
    template, costs=costs, load=load, memory=study.memory, shape=study.shape
  )
  plain = make(bare(study, 0), bare_policy).service
  demand = _demand(study, load, plain)
  layout = Layout(
    study.groups, study.ranks + policy.spares, study.devices_per_host,
    study.hosts_per_rack,
  )  # fmt: skip
  minutes = int(study.days * DAY_S // MINUTE_S)

  @functools.cache
  def prepared(offset: int) -> Template:
    ready = make(bare(study, policy.spares, offset), policy)
    return with_healthy(ready, demand, minutes)

  first = prepared(0)
  setting = Setting(
    policy, fallback, costs, load, study.memory, study.shape, demand,
    study.detect_s, study.straggler_s, _is_cold(policy, first),
    study.restart_part,
  )  # fmt: skip
  faults = draw(
    layout, study.failures, study.days, np.random.default_rng([seed, _FAULTS])
  )
  total = Tally()
  until_s = study.days * DAY_S
  for number in faults.struck:
    rng = np.random.default_rng([seed, _GROUP, number])
    group = Group(setting, prepared(layout.rack_offset(number)), number, rng)
    strikes = faults.strikes.get(number, [])
    total.add(group.run(strikes, faults.slows.get(number, []), until_s))
  quiet = study.groups - len(faults.struck)
  total.full_s += quiet * until_s
  total.capacity_s += quiet * until_s
  assert first.healthy is not None
  total.counts.add(first.healthy.total, quiet)
  total.records.sort(key=lambda r: (r["t_s"], r["group"]))
  sample = _sample(study, policy, first, plain.capacity, total, load)
  sample.update(seed=seed, events=faults.failures, struck=len(faults.struck))
  return Result(sample, total.records)


def _demand(study: Study, load: Load, plain: Service) -> Demand:
  """Requests of a group, whose mean is a part of the bare capacity."""
  capacity = plain.capacity
  rate = study.utilisation * capacity
  steps = prompt_steps(load, study.shape.chunk)
  first_token_s = plain.first_token_s(plain.running(rate), steps)
  return Demand(
    rate * load.relative,
    max(study.ttft_slo_s - first_token_s, 0.0),
    study.patience_s,
    study.patience_s * capacity,
  )


def _is_cold(policy: RecoveryPolicy, prepared: Template) -> bool:
  """Whether the policy restarts, and compiles when it does."""
  rank = int(prepared.view.mesh[0])
  plan = policy.recover(prepared.view, RanksLost((rank,)))
  if isinstance(plan, Infeasible) or not restarts(plan):
    return False
  return any(getattr(action, "cache", None) is False for action in plan.resume)


def weighted(
  stalls: list[tuple[float, float]], quantile: float
) -> float | None:
  """The seconds that this part of the stopped requests didn't exceed."""
  if not stalls:
    return None
  seconds, requests = np.array(sorted(stalls)).T
  below = np.cumsum(requests) / requests.sum()
  at = np.searchsorted(below, quantile - 1e-12)
  return float(seconds[min(at, len(seconds) - 1)])


def _sample(
  study: Study,
  policy: RecoveryPolicy,
  prepared: Template,
  plain: float,
  tally: Tally,
  load: Load,
) -> dict[str, Any]:
  """The numbers of a run."""
  span_s = study.days * DAY_S
  whole_s = span_s * study.groups
  counts, service = tally.counts, prepared.service
  asked = counts.arrived * load.generated_mean
  good = counts.in_time * load.generated_mean - tally.late_tokens
  devices = study.groups * (study.ranks + policy.spares)
  on_device, on_host = extra_bytes(prepared, study.memory, study.shape)
  each = service.capacity / (study.ranks + policy.spares)
  running = service.running(study.utilisation * plain)
  prefill_s = service.first_token_s(
    running, np.ceil(load.context / study.shape.chunk)
  )
  stalls, pauses = tally.stalls, tally.pauses
  return {
    "policy": policy.name,
    "devices": study.devices,
    "groups": study.groups,
    "ranks": study.ranks,
    "days": study.days,
    "full": tally.full_s / whole_s,
    "degraded": tally.degraded_s / whole_s,
    "zero": tally.zero_s / whole_s,
    "capacity": tally.capacity_s / whole_s,
    "goodput_tokens_per_s": good / span_s,
    "offered_tokens_per_s": asked / span_s,
    "goodput_fraction": good / asked if asked else 1.0,
    "goodput_per_device": good / span_s / devices,
    "requests_refused": counts.refused,
    "requests_lost": tally.requests_lost,
    "tokens_lost": tally.tokens_lost,
    "tokens_recomputed": tally.tokens_recomputed,
    "stall_p50_s": weighted(stalls, 0.5),
    "stall_p99_s": weighted(stalls, 0.99),
    "pause_p50_s": weighted(pauses, 0.5),
    "pause_p99_s": weighted(pauses, 0.99),
    "paused_requests": sum(requests for _, requests in pauses),
    "stalled_requests": sum(requests for _, requests in stalls),
    "ttft_p50_s": counts.wait_s(0.5, prefill_s),
    "ttft_p99_s": counts.wait_s(0.99, prefill_s),
    "ttft_p999_s": counts.wait_s(0.999, prefill_s),
    "failures": tally.failures,
    "ranks_lost": tally.ranks_lost,
    "plans": tally.plans,
    "abandoned": tally.abandoned,
    "fallbacks": tally.fallbacks,
    "planned_restarts": tally.planned_restarts,
    "outages": tally.outages,
    "drained": tally.drained,
    "weight_bytes_moved": tally.weight_bytes,
    "kv_bytes_restored": tally.kv_bytes,
    "redundancy_device_bytes": study.groups * on_device,
    "redundancy_host_bytes": study.groups * on_host,
    "redundancy_memory": on_device
    / ((study.ranks + policy.spares) * study.memory.device_bytes),
    "spare_devices": study.groups * policy.spares,
    "rows_per_rank": prepared.view.rows_per_rank,
    "slots_per_rank": prepared.view.slots_per_rank,
    "capacity_tokens_per_s": (
      study.groups * service.capacity * load.generated_mean
    ),
    "throughput_cost": 1 - each / (plain / study.ranks),
  }


