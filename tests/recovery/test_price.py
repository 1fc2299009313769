"""Prices follow from bytes, tokens and what is ready; lines say it."""

import dataclasses

import pytest

from resilient_moe import recovery as rm
from tests.recovery import cases

HW = dataclasses.replace(
  rm.THIS_MACHINE,
  peer_bytes_per_s=100.0,
  host_bytes_per_s=50.0,
  disk_bytes_per_s=10.0,
  copy_latency_s=0.0,
  prefill_tokens_per_s=10.0,
  step_s=0.5,
)


def view(policy="kv_restore"):
  made = cases.serving(rm.load(policy), "8x16")
  return dataclasses.replace(made, expert_bytes=1000, token_kv_bytes=2)


@pytest.mark.parametrize(
  ("tier", "moves", "seconds"),
  [
    (rm.Tier.HOST, [(0, 0), (1, 1)], 20.0),  # two ranks at once
    (rm.Tier.HOST, [(0, 0), (1, 0)], 40.0),  # one rank, one after the other
    (rm.Tier.DISK, [(0, 0), (1, 1)], 200.0),  # the disk serves both
    (rm.Tier.PEER, [(0, 0), (1, 1)], 20.0),  # both from rank 7
  ],
)
def test_copies_cost_what_the_busiest_moves(tier, moves, seconds):
  moves = tuple(rm.Move(e, r, 3 + e, 7) for e, r in moves)
  cost = rm.price(rm.CopyExperts(moves, tier), view(), HW)
  assert cost.bytes == 2000
  assert cost.seconds == pytest.approx(seconds)


def test_programs_cost_what_has_to_be_done():
  here = view()
  ready = rm.price(rm.FetchExecutable(frozenset({3})), here, HW)
  cold = rm.price(rm.FetchExecutable(frozenset({3, 4})), here, HW)
  kept = dataclasses.replace(here, cached=frozenset({frozenset({3, 4})}))
  loaded = rm.price(rm.FetchExecutable(frozenset({3, 4})), kept, HW)
  assert (ready.seconds, loaded.seconds, cold.seconds) == (
    HW.warm_s,
    HW.load_executable_s,
    HW.compile_s,
  )


def test_restored_kv_pays_its_bytes_and_the_suffix():
  gone = rm.lose(view(), (3,))
  gone = rm.advance(gone, rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7)))
  restore = rm.RestoreKV(("r0003",), (5,), rm.Tier.PEER)
  cost = rm.price(restore, gone, HW)
  assert cost.bytes == 117 * 2
  assert cost.seconds == pytest.approx(2.34 + max(3 / 10, 0.5))
  again = rm.price(rm.RecomputePrefix(("r0003",), (5,)), gone, HW)
  assert again.seconds == pytest.approx(120 / 10)
  assert again.bytes == 0


def test_a_plan_costs_the_sum_of_its_actions():
  gone = rm.lose(view(), (3,))
  plan = rm.load("kv_restore").recover(gone, rm.RanksLost((3,)))
  price = rm.price_plan(plan, gone, HW)
  n = len(plan.resume)
  parts = [cost.seconds for _, cost in price.by_action]
  assert price.resume.seconds == pytest.approx(sum(parts[:n]))
  assert price.repair.seconds == pytest.approx(sum(parts[n:]))
  assert len(parts) == n + len(plan.repair)


def test_a_restart_is_dearer_than_recovering_and_a_cold_one_dearest():
  gone = rm.lose(view("restart_cached"), (3,))
  lost = rm.RanksLost((3,))
  seconds = [
    rm.price_plan(rm.load(n).recover(gone, lost), gone, HW).resume.seconds
    for n in ("mesh_shrink", "restart_cached", "restart")
  ]
  assert seconds == sorted(seconds)
  assert seconds[2] - seconds[1] == pytest.approx(
    HW.compile_s - HW.load_executable_s
  )


def test_one_line_explains_a_plan():
  gone = rm.lose(view("mesh_shrink"), (3,))
  plan = rm.load("mesh_shrink").recover(gone, rm.RanksLost((3,)))
  line = rm.explain_plan(plan)
  assert line == (
    "pause 16 requests, resume: fence 3; mesh of 7 ranks; programs of mesh "
    "without 3; copy 2 experts from host: 6->0.2, 7->1.2; route 16 experts "
    "to 16 slots; prefill again 2 requests: r0003->0, r0011->1"
  )


def test_apart_no_mesh_has_programs_to_pay():
  gone = cases.serving(rm.load("restart_cached"), "3+5x16")
  gone = rm.advance(rm.lose(gone, (3,)), rm.RebuildMesh((0, 1, 2, 4, 5, 6, 7)))
  launched = rm.advance(gone, rm.LaunchRank(3))
  assert rm.price(rm.Rejoin(3), launched, HW).seconds == HW.mesh_s
  ranks = tuple(gone.mesh.tolist())
  cold, stored = (
    rm.price(rm.RestartInstance(ranks, cache), gone, HW).seconds
    for cache in (False, True)
  )
  assert cold - stored == pytest.approx(HW.compile_s - HW.load_executable_s)
