"""A group under faults that are known: what happens, and how long it takes."""

import dataclasses
import functools

import numpy as np
import pytest

from resilient_moe.recovery import RanksLost, load, ordered
from resilient_moe.recovery.semantics import advance
from resilient_moe.sim import arrivals, fleet
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.devices import device
from resilient_moe.sim.failure_rates import failure_model
from resilient_moe.sim.fleet_faults import Slow, Strike
from resilient_moe.sim.fleet_group import Group
from resilient_moe.sim.fleet_queue import Demand
from resilient_moe.sim.fleet_requests import Seated, in_decode
from resilient_moe.sim.fleet_setting import (
  Memory,
  Setting,
  Shape,
  template,
  with_healthy,
)
from resilient_moe.sim.shapes import shape

RANKS = 8
DETECT_S = 1.0
HOUR_S = 3600.0


@functools.cache
def costs():
  return Roofline(device("h100"), shape("olmoe-1b-7b"))


def study(**changes):
  model = shape("olmoe-1b-7b")
  base = fleet.Study(
    model=fleet.Model(
      model.n_experts, model.top_k, model.expert_bytes, model.token_kv_bytes
    ),
    memory=Memory(80e9, float(model.dense_bytes)),
    shape=Shape(2000.0, 512, 64, 0.1),
    failures=failure_model("rsc1"),
    groups=2,
    ranks=RANKS,
    devices_per_host=4,
    hosts_per_rack=1,
    days=1.0,
    detect_s=DETECT_S,
  )
  return dataclasses.replace(base, **changes)


def steady():
  """A load without bursts."""
  return arrivals.Load("steady", np.ones(1), np.array([1000]), np.array([200]))


def group(policy, seed, **changes):
  """A group, and what it is made of."""
  of, requests = study(), steady()
  prepared = template(
    fleet.bare(of, policy.spares), policy, costs(), requests, of.memory,
    of.shape,
  )  # fmt: skip
  rate = 0.5 * prepared.service.capacity
  demand = Demand(np.array([rate]), 5.0, 60.0, 60 * prepared.service.capacity)
  setting = Setting(
    policy, load("restart_cached"), costs(), requests, of.memory, of.shape,
    demand, DETECT_S, 60.0, **changes,
  )  # fmt: skip
  prepared = with_healthy(prepared, demand, 24 * 60)
  made = Group(setting, prepared, 0, np.random.default_rng(seed))
  return made, setting, prepared


def strike(t_s, *ranks, back_s=1e9):
  return Strike(t_s, "device", ranks, (back_s,) * len(ranks))


def resume_price(setting, prepared, ranks, rate):
  """Seconds of the policy's own plan, by hand."""
  rows = prepared.service.running(rate)
  view = in_decode(
    prepared.view, setting.load, Seated(rows, prepared.standing.checkpoint),
    np.random.default_rng(0),
  )  # fmt: skip
  plan = setting.policy.recover(view, RanksLost(ranks))
  total = 0.0
  for action in ordered(plan.resume):
    total += setting.costs.price(action, view).seconds
    view = advance(view, action)
  return total, view


@pytest.mark.parametrize("name", ["mesh_shrink", "kv_restore"])
def test_a_stall_is_detection_and_the_price_of_resume(name, seed):
  made, setting, prepared = group(load(name), seed)
  rate = setting.demand.at(0)
  price_s, left = resume_price(setting, prepared, (3,), rate)
  tally = made.run([strike(1000.3, 3)], [], HOUR_S)
  stall_s = tally.records[0]["stall_s"]
  # Which requests were caught differs, and with it what is prefilled.
  longest_s, _ = max(tally.stalls)
  assert longest_s == pytest.approx(DETECT_S + price_s, rel=0.1)
  # Who kept its KV doesn't wait for the prefill of the others.
  caught = round(RANKS * prepared.service.running(rate))
  assert sum(n for _, n in tally.stalls) == pytest.approx(caught)
  assert tally.stalls[0][0] == stall_s < longest_s
  assert tally.stalls[0][1] == pytest.approx(caught * 7 / 8, abs=1)
  assert tally.zero_s == pytest.approx(stall_s)
  assert tally.full_s == pytest.approx(1000.3)
  assert tally.degraded_s == pytest.approx(HOUR_S - 1000.3 - stall_s)
  assert len(left.mesh) == RANKS - 1
  arrived, counts = rate * HOUR_S, tally.counts
  assert counts.arrived == pytest.approx(arrived)
  assert counts.started == pytest.approx(arrived)
  assert counts.at_once < arrived - stall_s * rate + 1


def test_the_loss_of_a_spare_stops_nobody(seed):
  made, _, _ = group(load("spare"), seed)
  # Rank 3's successor stands by, as 8 has taken its place; then it dies too.
  strikes = [strike(1000.3, 3, back_s=2000.0), strike(3000.0, 3)]
  tally = made.run(strikes, [], HOUR_S)
  first, _, second = tally.records
  assert first["recomputed"] > 0
  assert "stall_s" in first
  assert second["resume"] == [["Fence"]]
  assert second["recomputed"] == 0
  assert second["stopped"] == 0
  stopped = sum(n for _, n in tally.stalls)
  assert stopped == pytest.approx(first["stopped"])


def test_a_replacement_makes_it_whole_again(seed):
  made, _, _ = group(load("mesh_shrink", replace=True), seed)
  tally = made.run([strike(1000.0, 3, back_s=1500.0)], [], HOUR_S)
  (record,) = tally.records
  started_s = device("h100").process_start_s
  assert record["redundancy_s"] > 500 + started_s
  assert tally.degraded_s == pytest.approx(
    record["redundancy_s"] - record["stall_s"], rel=0.05
  )
  full_s = HOUR_S - record["redundancy_s"]
  assert tally.full_s == pytest.approx(full_s, rel=0.01)
  # The loss, and the short pause in which the replacement joins.
  stopped = sum(n for _, n in tally.stalls)
  assert stopped == pytest.approx(record["stopped"])
  ((pause_s, _),) = tally.pauses
  assert pause_s < 1.0


def test_a_failure_inside_resume_abandons_the_plan(seed):
  made, _, _ = group(load("mesh_shrink"), seed)
  tally = made.run(
    [strike(1000.0, 3), strike(1001.01, 5)], [], HOUR_S
  )
  assert (tally.plans, tally.abandoned, tally.failures) == (2, 1, 2)
  (record,) = tally.records
  assert record["stall_s"] > 1.01 + DETECT_S
  assert record["ranks"] == [3, 5]


def test_two_failures_before_the_report_are_one(seed):
  made, _, _ = group(load("mesh_shrink", losses=2), seed)
  tally = made.run([strike(1000.0, 3), strike(1000.5, 5)], [], HOUR_S)
  assert (tally.plans, tally.abandoned) == (1, 0)
  assert tally.stalls[0][0] > 0.5 + DETECT_S


def test_what_a_policy_can_not_do_is_restarted(seed):
  policy = load("spare")
  made, _, _ = group(policy, seed)
  tally = made.run([strike(1000.0, 1), strike(2000.0, 2)], [], HOUR_S)
  assert tally.fallbacks == 1
  assert "spare" in tally.records[1]["fallback"]
  assert tally.records[1]["stall_s"] > device("h100").process_start_s


def test_idle_devices_come_back_with_a_restart(seed):
  policy = load("mesh_shrink", losses=3)
  made, _, _ = group(policy, seed, restart_part=0.2)
  tally = made.run(
    [strike(1000.0, 1, back_s=1100.0), strike(2000.0, 2, back_s=2100.0)],
    [],
    HOUR_S,
  )
  assert tally.planned_restarts == 1
  cause = tally.records[-1]["cause"]
  assert cause == "return"
  assert tally.pauses[-1][0] == tally.records[-1]["stall_s"]
  after = HOUR_S - 2100.0 - tally.records[-1]["stall_s"]
  assert tally.full_s == pytest.approx(1000.0 + after)


def test_a_spare_that_is_repaired_stands_by_again(seed):
  made, _, _ = group(load("spare"), seed)
  tally = made.run(
    [strike(1000.0, 1, back_s=1500.0), strike(2000.0, 2, back_s=1e9)],
    [],
    HOUR_S,
  )
  assert (tally.fallbacks, tally.planned_restarts) == (0, 0)
  assert tally.plans == 3
  # Programs of the meshes that it would join were made ready meanwhile.
  first, second = (r["stall_s"] for r in tally.records if "stall_s" in r)
  assert second == pytest.approx(first, rel=0.2)


def test_a_group_below_its_minimum_waits_for_devices(seed):
  made, _, _ = group(load("mesh_shrink"), seed)
  everyone = tuple(range(RANKS))
  tally = made.run([strike(1000.0, *everyone, back_s=2000.0)], [], HOUR_S)
  assert tally.outages == 1
  assert tally.records[0]["down"]
  assert tally.zero_s > 1000.0 + device("h100").process_start_s
  assert tally.full_s == pytest.approx(HOUR_S - tally.zero_s)
  assert tally.counts.refused > 0


def test_a_failure_while_it_restarts_starts_again(seed):
  made, _, _ = group(load("restart_cached"), seed)
  tally = made.run(
    [strike(1000.0, 1), strike(1005.0, 2)], [], HOUR_S
  )
  stall_s = tally.records[-1]["stall_s"]
  start_s = float(device("h100").process_start_s)
  assert stall_s > 5.0 + DETECT_S + start_s
  assert tally.abandoned == 1


def test_a_failure_while_it_restarts_is_not_left_to_the_policy(seed):
  """Nothing serves yet, so that nothing could shrink."""
  made, _, _ = group(load("mesh_shrink"), seed, restart_part=0.1)
  tally = made.run(
    [strike(1000.0, 1, back_s=1100.0), strike(1105.0, 5)], [], HOUR_S
  )
  assert tally.planned_restarts == 1
  assert not tally.pauses
  start_s = float(device("h100").process_start_s)
  assert tally.stalls[-1][0] > 5.0 + DETECT_S + start_s


def test_a_dead_process_is_taken_along_by_the_restart(seed):
  made, _, _ = group(load("restart_cached"), seed)
  died = Strike(1000.0, "process", (4,), (1000.0,))
  tally = made.run([died], [], HOUR_S)
  assert tally.degraded_s == 0
  assert tally.zero_s == pytest.approx(tally.stalls[-1][0])
  # Prompts are prefilled again in turn: the first goes on before the last.
  assert tally.stalls[0][0] < tally.stalls[-1][0]


@pytest.mark.parametrize("drain", [False, True])
def test_stragglers_are_tolerated_or_drained(drain, seed):
  policy = load("mesh_shrink", drain_stragglers=drain, replace=True)
  made, _, _ = group(policy, seed)
  slow = Slow(1000.0, 3, 1.5, 2000.0)
  tally = made.run([], [slow], HOUR_S)
  assert tally.drained == int(drain)
  if drain:
    assert tally.stalls
    assert tally.records[0]["cause"] == "straggler"
  else:
    assert tally.degraded_s == pytest.approx(1000.0)
    assert not tally.stalls
  assert tally.zero_s < 10


def test_failed_requests_are_counted_and_sent_again(seed):
  made, setting, prepared = group(load("retry"), seed)
  tally = made.run([strike(1000.0, 3)], [], HOUR_S)
  each = prepared.service.running(setting.demand.at(0))
  assert tally.requests_lost == pytest.approx(each, abs=1)
  assert tally.tokens_lost > 0
  arrived = setting.demand.at(0) * HOUR_S
  assert tally.counts.arrived == pytest.approx(arrived + tally.requests_lost)


def test_equal_seeds_give_equal_months(seed):
  strikes = [strike(1000.0, 1, back_s=1500.0), strike(1600.0, 2, 3)]
  tallies = [
    group(load("kv_restore", replace=True), s)[0].run(strikes, [], HOUR_S)
    for s in (seed, seed, seed + 1)
  ]
  first, same, other = (
    (t.stalls, t.records, t.counts.started) for t in tallies
  )
  assert first == same
  assert first != other


def fleet_of(policy, seed, **changes):
  return fleet.simulate(
    study(**changes), policy, load("none"), load("restart_cached"), costs(),
    steady(), seed,
  )  # fmt: skip


def test_a_fleet_without_faults_is_full_service(seed):
  sample = fleet_of(
    load("none"), seed, failures=failure_model("never", multiplier=0.0)
  ).sample
  assert sample["full"] == pytest.approx(1)
  assert sample["goodput_fraction"] == pytest.approx(1)
  offered = 0.7 * sample["capacity_tokens_per_s"]
  assert sample["offered_tokens_per_s"] == pytest.approx(offered)
  assert sample["stall_p99_s"] is None
  assert sample["failures"] == sample["struck"] == 0


def test_a_fleet_is_its_seed_and_its_parts_add_up(seed):
  broken = failure_model("rsc1", multiplier=200)
  runs = [
    fleet_of(load("mesh_shrink", replace=True), s, failures=broken, groups=6)
    for s in (seed, seed, seed + 1)
  ]
  assert runs[0] == runs[1]
  assert runs[0].sample != runs[2].sample
  sample = runs[0].sample
  assert sample["failures"] > 5
  parts = sum(sample[name] for name in ("full", "degraded", "zero"))
  assert parts == pytest.approx(1)
  assert 0 < sample["goodput_fraction"] < 1


def test_redundancy_costs_memory_and_devices(seed):
  quiet = failure_model("never", multiplier=0.0)
  found = {
    name: fleet_of(load(name), seed, failures=quiet).sample
    for name in ("none", "replica_promotion", "spare", "kv_restore")
  }
  memory = {n: s["redundancy_device_bytes"] for n, s in found.items()}
  assert memory["none"] == 0
  assert memory["replica_promotion"] < memory["kv_restore"]
  assert found["spare"]["throughput_cost"] == pytest.approx(1 / 9, abs=0.02)
  assert found["spare"]["spare_devices"] == 2


def test_a_group_that_does_not_fit_is_named():
  model = shape("deepseek-v3")
  of = study(
    model=fleet.Model(256, 8, model.expert_bytes, model.token_kv_bytes),
    memory=Memory(80e9, float(model.dense_bytes)),
  )
  with pytest.raises(ValueError, match="'none': no rows for requests: 0 of"):
    template(
      fleet.bare(of, 0), load("none"), Roofline(device("h100"), model),
      steady(), of.memory, of.shape,
    )  # fmt: skip
