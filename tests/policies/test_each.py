"""What each shipped policy promises in its docstring."""

import dataclasses
import importlib

import numpy as np
import pytest

from resilient_moe import recovery as rm
from tests.policies.ask import kinds, only, recovered
from tests.recovery import cases

LOST = rm.RanksLost((3,))


@pytest.mark.parametrize("name", rm.policy_names())
def test_a_docstring_says_what_stands_what_is_promised_and_after_whom(name):
  text = importlib.import_module(f"policies.{name}").__doc__
  for heading in ("Keeps standing:", "Promises:", "After:"):
    assert heading in text
  lossy = not rm.load(name).lossless
  assert ("LOSSY" in text) == lossy


def test_none_recovers_from_nothing():
  for failure in (LOST, rm.RanksLeaving((1,), 1.0), rm.Straggler(2, 2.0)):
    _, answer = recovered("none", failure)
    assert isinstance(answer, rm.Infeasible)


@pytest.mark.parametrize("cache", [False, True])
def test_restarts_are_a_restart(cache):
  name = "restart_cached" if cache else "restart"
  view, plan = recovered(name)
  assert kinds(plan.resume) == [rm.Fence, rm.RestartInstance]
  assert plan.resume[1].cache == cache
  assert set(plan.paused) == set(view.requests.request_id)
  assert rm.load(name).prepare(rm.bare_view(8, 16)).store_executables == cache
  if cache:
    assert frozenset({3}) in view.cached


def test_mesh_shrink_copies_what_was_lost_before_it_goes_on():
  _, plan = recovered("mesh_shrink")
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert sorted(m.expert for m in copy.moves) == [6, 7]
  assert copy.tier == rm.Tier.HOST
  assert plan.repair == ()
  _, plan = recovered("mesh_shrink", host_weights=False)
  assert only(plan.resume, rm.CopyExperts)[0].tier == rm.Tier.DISK


@pytest.mark.parametrize("losses", [1, 2, 3])
def test_the_promised_number_of_losses_is_survived(losses):
  lost = rm.RanksLost(tuple(range(losses)))
  view, plan = recovered("mesh_shrink", lost, losses=losses, requests=32)
  assert isinstance(plan, rm.Plan)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert (after.requests.rank >= 0).all(), "rows were reserved for everybody"


def test_too_many_losses_name_the_limit():
  lost = rm.RanksLost((0, 1, 2, 3, 4))
  _, answer = recovered("mesh_shrink", lost)
  assert answer.reason == (
    "10 experts need a slot, 3 are free on 3 ranks of 3"
  )


@pytest.mark.parametrize("shadows", [False, True])
def test_replicas_are_promoted_without_a_copy(shadows):
  view, plan = recovered("replica_promotion", shadows=shadows)
  assert not only(plan.resume, rm.CopyExperts)
  assert bool(only(plan.resume, rm.RemapExperts)) == shadows
  after = rm.advance_all(view, rm.ordered(plan.resume))
  repaired = rm.advance_all(after, rm.ordered(plan.repair))
  for expert in range(16):
    assert len(cases.held(repaired, expert)) == 2
  (copy,) = only(plan.repair, rm.CopyExperts)
  assert copy.tier == rm.Tier.PEER
  served = repaired.table.copies()
  assert (served == (1 if shadows else 2)).all()


def test_shadows_serve_nothing_in_peacetime():
  view = cases.serving(rm.load("replica_promotion", shadows=True), "8x16")
  assert (view.slots >= 0).sum() == 32
  serving = np.bincount(view.table.entries[:, :, 0].ravel(), minlength=8)
  assert serving.tolist() == [2] * 8, "the first copies serve, balanced"


def test_only_experts_without_a_replica_are_copied():
  _, plan = recovered("replica_promotion", replicas=7)
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert [m.expert for m in copy.moves] == [7]


def test_kv_is_restored_where_it_was_checkpointed():
  _, plan = recovered("kv_restore")
  (restore,) = only(plan.resume, rm.RestoreKV)
  assert restore.requests == ("r0003", "r0011")
  assert restore.tier == rm.Tier.PEER
  _, plan = recovered("kv_restore", checkpoint="host")
  assert only(plan.resume, rm.RestoreKV)[0].tier == rm.Tier.HOST


def test_a_checkpoint_that_died_too_falls_back_to_prefill():
  view, plan = recovered("kv_restore", rm.RanksLost((3, 4)))
  (restore,) = only(plan.resume, rm.RestoreKV)
  (again,) = only(plan.resume, rm.RecomputePrefix)
  assert restore.requests == ("r0004", "r0012")  # held by rank 5
  assert again.requests == ("r0003", "r0011")  # held by rank 4
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert (after.requests.rank >= 0).all()


def changed(view, **columns):
  """The view with other columns in its request table."""
  arrays = {k: np.array(v, np.int32) for k, v in columns.items()}
  requests = dataclasses.replace(view.requests, **arrays)
  return dataclasses.replace(view, requests=requests)


def test_a_checkpoint_that_was_not_begun_is_no_checkpoint():
  policy = rm.load("kv_restore")
  view = cases.serving(policy, "8x16")
  kept = view.requests.checkpoint_tokens.copy()
  kept[3] = 0  # admitted a moment ago: the neighbour has nothing yet
  view = cases.after(changed(view, checkpoint_tokens=kept), LOST)
  plan = rm.recover_checked(policy, view, LOST)
  assert only(plan.resume, rm.RestoreKV)[0].requests == ("r0011",)
  assert only(plan.resume, rm.RecomputePrefix)[0].requests == ("r0003",)


def test_requests_left_without_kv_by_an_abandoned_plan_stay_and_get_it():
  view = cases.serving(rm.load("kv_restore"), "8x16")
  kv = view.requests.kv_tokens.copy()
  kv[[0, 1]] = 0
  bare = cases.after(changed(view, kv_tokens=kv), LOST)
  plan = rm.recover_checked(rm.load("kv_restore"), bare, LOST)
  (restore,) = only(plan.resume, rm.RestoreKV)
  assert dict(zip(restore.requests, restore.to, strict=True)).items() >= {
    ("r0000", 0),
    ("r0001", 1),
  }
  plan = rm.recover_checked(rm.load("retry"), bare, LOST)
  (again,) = only(plan.resume, rm.RecomputePrefix)
  assert (again.requests, again.to) == (("r0000", "r0001"), (0, 1))


@pytest.mark.parametrize("name", ["restart", "mesh_shrink", "kv_restore"])
def test_who_was_lost_before_a_plan_was_abandoned_is_fenced_too(name):
  policy = rm.load(name)
  view = cases.after(cases.serving(policy, "8x16"), LOST)
  second = rm.RanksLost((5,))
  plan = rm.recover_checked(policy, cases.after(view, second), second)
  assert plan.resume[0] == rm.Fence((3, 5))


def test_masked_experts_come_back_behind_traffic():
  view, plan = recovered("mask_experts")
  assert not only(plan.resume, rm.CopyExperts)
  (mask,) = only(plan.resume, rm.MaskExperts)
  assert mask.experts == (6, 7)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert after.masked.sum() == 2
  repaired = rm.advance_all(after, rm.ordered(plan.repair))
  assert not repaired.masked.any()
  _, answer = recovered("mask_experts", min_live=15)
  assert answer.reason == "14 experts are left, 15 are needed"
  _, plan = recovered("mask_experts", rm.RanksLeaving((3,), 1.0))
  assert not only(plan.resume, rm.MaskExperts), "a leaving rank can be read"


def test_a_spare_takes_the_place_of_the_lost():
  view, plan = recovered("spare", spares=2)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert after.mesh.tolist() == [0, 1, 2, 8, 4, 5, 6, 7]
  lost = rm.RanksLost((5,))
  view = cases.after(after, lost)
  policy = rm.load("spare", spares=2)
  plan = rm.recover_checked(policy, view, lost)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert after.mesh.tolist() == [0, 1, 2, 8, 4, 9, 6, 7]
  third = rm.RanksLost((0,))
  answer = policy.recover(cases.after(after, third), third)
  assert answer.reason == "0 of 2 spares are left; a loss needs 1"


def test_retry_fails_only_those_of_lost_ranks():
  view, plan = recovered("retry")
  (ended,) = only(plan.resume, rm.FailRequests)
  assert ended.requests == ("r0003", "r0011")
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert len(after.requests.request_id) == 14
  _, plan = recovered("retry", rm.RanksLeaving((3,), 1.0))
  assert not only(plan.resume, rm.FailRequests)


def test_the_cheapest_is_the_one_with_checkpointed_kv():
  _, plan = recovered("cheapest")
  assert only(plan.resume, rm.RestoreKV)
  assert not only(plan.resume, rm.RestartInstance)


def test_eep_repairs_several_lost_ranks_from_where_it_is_nearest():
  lost = rm.RanksLost((3, 4))
  view, plan = recovered("eep", lost, replicas=8, losses=2)
  gone = {6, 7, 8, 9}  # 0 to 7 have a second copy: nothing to bring
  (copy,) = only(plan.resume, rm.CopyExperts)
  alive = {e for e in gone if cases.held(view, e)}
  assert alive
  assert {m.expert for m in copy.moves} == gone - alive
  assert copy.tier == rm.Tier.HOST
  (ended,) = only(plan.resume, rm.FailRequests)
  assert ended.requests == ("r0003", "r0004", "r0011", "r0012")
  assert all(c.tier == rm.Tier.PEER for c in only(plan.repair, rm.CopyExperts))
  assert [a.rank for a in only(plan.repair, rm.Rejoin)] == [3, 4]
  _, plan = recovered("eep", rm.RanksLeaving((3,), 1.0))
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert copy.tier == rm.Tier.PEER
  assert not only(plan.resume, rm.FailRequests)
