import dataclasses

import numpy as np
import pytest

from resilient_moe.recovery import (
  ACTIONS,
  CopyExperts,
  Fence,
  FetchExecutable,
  LaunchRank,
  Move,
  RanksLost,
  RecomputePrefix,
  RestartInstance,
  RestoreKV,
  Tier,
  Verify,
  big_view,
  load,
  lose,
  price,
  price_plan,
)
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.cost_actions import STAGES, stages
from resilient_moe.sim.devices import device
from resilient_moe.sim.hardware import Figure, replace
from resilient_moe.sim.shapes import shape
from tests.sim.costs import PLAIN, SMALL, decode, model, view

EXPERT = SMALL.expert_bytes  # 2 layers x 60 x 4 B


def _copy(v, tier, *moves):
  return CopyExperts(tuple(Move(*m) for m in moves), tier)


def test_every_action_has_a_price():
  assert set(STAGES) == set(ACTIONS)


@pytest.mark.parametrize(
  ("tier", "moves", "seconds"),
  [
    # Two experts to one device: its own link decides.
    (Tier.HOST, [(0, 1, 0, -1), (1, 1, 1, -1)], 2 * 480 / 1e5),
    (Tier.HOST, [(0, 0, 0, -1), (1, 1, 1, -1)], 480 / 1e5),
    # A host's disk is shared by its devices, which read one expert once.
    (Tier.DISK, [(0, 0, 0, -1), (1, 1, 1, -1)], 2 * 480 / 1e3),
    (Tier.DISK, [(0, 0, 0, -1), (0, 1, 1, -1)], 480 / 1e3),
    (Tier.DISK, [(0, 0, 0, -1), (1, 2, 1, -1)], 480 / 1e3),
    (Tier.STORE, [(0, 0, 0, -1), (1, 1, 1, -1)], 2 * 480 / 1e2),
    # Inside a host; between hosts; one source for two.
    (Tier.PEER, [(0, 1, 0, 0)], 480 / 1e5),
    (Tier.PEER, [(0, 2, 0, 0)], 480 / 1e4),
    (Tier.PEER, [(0, 2, 0, 0), (1, 3, 0, 0)], 2 * 480 / 1e4),
    (Tier.PEER, [(0, 2, 0, 0), (1, 3, 0, 1)], 480 / 1e4),
    # Both links at once.
    (Tier.PEER, [(0, 1, 0, 0), (1, 2, 0, 0)], 480 / 1e4),
    (Tier.LOCAL, [(0, 0, 1, 0)], 480 / 5e5),
  ],
)
def test_copies_wait_for_the_busiest_end(tier, moves, seconds):
  cost = model().price(_copy(view(), tier, *moves), view())
  assert cost.seconds == pytest.approx(0.01 + seconds)
  assert cost.bytes == len(moves) * 480


def test_bytes_by_link():
  v = view()
  moves = [(0, 1, 0, 0), (1, 2, 0, 0), (2, 3, 0, 1)]
  _, moved = stages(model(), _copy(v, Tier.PEER, *moves), v)
  by_link = {t.link: (t.nbytes, t.busiest_bytes) for t in moved.traffic}
  assert by_link == {"intra": (480, 480), "inter": (960, 480)}


def test_programs_by_where_they_are():
  v = view(losses=1)
  m = model()
  gone = frozenset({1})
  ready = dataclasses.replace(v, ready=v.ready | {gone})
  cached = dataclasses.replace(v, ready=frozenset(), cached=frozenset({gone}))
  nowhere = dataclasses.replace(cached, cached=frozenset())
  fetch = FetchExecutable(gone)
  found = [m.price(fetch, w).seconds for w in (ready, cached, nowhere)]
  assert found == [0.1, 10.0, 100.0]


def test_a_restart_by_hand():
  v = view(ranks=4, requests=4)
  m = model()
  lost = lose(v, (3,))
  action = RestartInstance((0, 1, 2), True)
  parts = {s.name: s.seconds for s in stages(m, action, lost)}
  # 8 experts on three ranks, two of them (6 experts) on host 0, which also
  # reads the dense weights once; host 1 reads less.
  dense = SMALL.dense_bytes
  assert parts["weights"] == pytest.approx((6 * EXPERT + dense) / 1e3)
  assert parts["process_start"] == 7.0
  assert parts["load_executable"] == 10.0
  assert parts["mesh"] == 3.0
  assert parts["prefill"] > 0
  cold = {s.name for s in stages(m, RestartInstance((0, 1, 2), False), lost)}
  assert "compile" in cold


def test_restored_kv_is_bound_by_the_store_when_many_restore():
  m = model()
  v = view("kv_restore", ranks=8, requests=16, checkpoint="host")
  names = v.requests.request_id
  kv = float(v.requests.checkpoint_tokens[0]) * SMALL.token_kv_bytes
  one = stages(m, RestoreKV(names[:1], (2,), Tier.HOST), v)
  assert one[1].seconds == pytest.approx(kv / 1e4)  # the reader's NIC
  to = tuple(range(8))
  many = stages(m, RestoreKV(names[:8], to, Tier.HOST), v)
  assert many[1].seconds == pytest.approx(8 * kv / 2 / 1e4)  # two NICs serve


def test_the_suffix_is_prefilled_on_top():
  m = model()
  v = view("kv_restore", ranks=4, requests=4)
  names = v.requests.request_id[:1]  # it sits on rank 0
  lost = lose(v, (0,))
  restored = stages(m, RestoreKV(names, (2,), Tier.PEER), lost)
  table = v.requests
  behind = table.prompt_tokens[0] + table.emitted_tokens[0]
  behind -= table.checkpoint_tokens[0]
  assert behind == 3
  suffix = m.prefill_s(lost, np.array([2]), np.array([behind]))
  assert {s.name: s.seconds for s in restored}["prefill"] == suffix
  handed = stages(m, RestoreKV(names, (2,), Tier.PEER), v)
  assert "prefill" not in {s.name for s in handed}  # live KV has no suffix
  again = m.price(RecomputePrefix(names, (2,)), lost)
  assert again.seconds > suffix > 0


def test_prefill_takes_as_many_steps_as_chunks():
  v, m = view(), model(chunk=10)
  one = m.prefill_s(v, np.array([0]), np.array([10]))
  four = m.prefill_s(v, np.array([0]), np.array([40]))
  assert four > 4 * one  # later chunks attend to more
  both = m.prefill_s(v, np.array([0, 1]), np.array([10, 10]))
  assert both < 2 * one
  assert m.prefill_s(v, np.array([], int), np.array([])) == 0.0


def test_a_replacement_of_an_expert_rank_loads_no_dense_weights():
  v = view("kv_restore", ranks=6, attention=4, replicas=0)
  m = model()
  attending, holding = (m.price(LaunchRank(r), v).seconds for r in (0, 5))
  assert holding == 7.0
  assert attending == pytest.approx(7.0 + SMALL.dense_bytes / 1e3)


def test_verify_is_a_step_of_what_runs():
  v = view("kv_restore", ranks=4, requests=4)
  context = float(v.requests.kv_tokens[0])
  step = model().step_s(v, decode([1] * 4, context))
  assert model().price(Verify(), v).seconds == pytest.approx(step)
  assert model().price(Fence((1,)), v).seconds == 0.3


def test_prices_of_policies_follow_from_the_same_numbers():
  m = Roofline(device("h200"), shape("deepseek-v3"))
  for name in ("mesh_shrink", "kv_restore", "restart_cached"):
    v = view(name, ranks=16, requests=32, shape=m.shape, per_host=8)
    lost = lose(v, (5,))
    plan = load(name).recover(lost, RanksLost((5,)))
    exact = m.price_plan(plan, lost).resume.seconds
    simple = price_plan(plan, lost, m.hardware(lost)).resume.seconds
    # One rate a tier against links: near, as fixed stages are the same.
    assert simple == pytest.approx(exact, rel=0.35), name


def test_a_faster_disk_changes_both_prices_alike():
  slow = Roofline(device("h200"), shape("deepseek-v3"))
  fast = dataclasses.replace(
    slow,
    device=replace(slow.device, disk__bytes_per_s=Figure(1e12, "test")),
  )
  v = view("restart_cached", ranks=16, shape=slow.shape, per_host=8)
  lost = lose(v, (5,))
  plan = load("restart_cached").recover(lost, RanksLost((5,)))
  for prices in (
    [m.price_plan(plan, lost).resume.seconds for m in (slow, fast)],
    [price_plan(plan, lost, m.hardware(lost)).resume.seconds
     for m in (slow, fast)],
  ):  # fmt: skip
    assert prices[1] < prices[0] - 10


def test_each_host_has_its_own_disk_or_all_share_one():
  v = view()
  own = dataclasses.replace(model().hardware(v), copy_latency_s=0.0)
  one = dataclasses.replace(own, shared_by_host=False)
  moves = [(0, 0, 0, -1), (1, 1, 1, -1), (2, 2, 1, -1)]
  found = [price(_copy(v, Tier.DISK, *moves), v, h).seconds for h in (own, one)]
  assert found == pytest.approx([2 * 480 / 1e3, 3 * 480 / 1e3])


def test_a_plan_of_10240_ranks_is_priced_per_action():
  m = Roofline(device("h200"), shape("deepseek-v3"))
  lost = lose(big_view(), (5,))
  plan = load("kv_restore").recover(lost, RanksLost((5,)))
  found = m.price_plan(plan, lost)
  named = {type(a).__name__: c for a, c in found.by_action}
  assert named["RestoreKV"].bytes > 0
  total = sum(c.seconds for _, c in found.by_action)
  assert total == pytest.approx(found.resume.seconds + found.repair.seconds)


def test_no_traffic_takes_no_time():
  assert model().price(_copy(view(), Tier.PEER), view()).seconds == 0.0
  assert PLAIN.memory_bytes == 1e9
