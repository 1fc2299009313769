"""What each shipped policy promises where attention and experts are apart."""

import numpy as np
import pytest

from resilient_moe import recovery as rm
from tests.policies.ask import done, kinds, on, only, recovered
from tests.recovery import cases

FREE = "3+5x16"  # 4 slots a rank without reserve: some stay free
FULL = "2+4x8"  # every slot is taken without reserve
EXPERT, ATTENTION = rm.RanksLost((3,)), rm.RanksLost((0,))


def test_tarragon_makes_the_shadows_official_and_nobody_waits():
  view, plan = recovered("tarragon", EXPERT, FREE)
  assert kinds(plan.resume) == [rm.Fence, rm.RebuildMesh, rm.RemapExperts]
  assert plan.paused == ()
  lost = [0, 1, 2, 3]  # its first copies
  entries = plan.resume[2].table.entries
  for expert in lost:
    rank, slot = entries[expert, 0]
    assert view.slots[rank, slot] == expert, "a shadow that was there"
  stay = np.setdiff1d(np.arange(16), lost)
  assert (entries[stay] == view.table.entries[stay]).all()


@pytest.mark.parametrize("lost", [(3,), (3, 4), (0, 3), (0,)])
def test_tarragon_brings_ranks_and_shadows_back_behind_traffic(lost):
  view, plan = recovered("tarragon", rm.RanksLost(lost), FREE)
  _, repaired = done(view, plan)
  launched = [a.rank for a in only(plan.repair, rm.LaunchRank)]
  assert launched == [a.rank for a in only(plan.repair, rm.Rejoin)]
  assert launched == list(lost)
  assert repaired.mesh.tolist() == list(range(8))
  for expert in range(16):
    assert len(cases.held(repaired, expert)) >= 2, "a copy and a shadow"
  assert (repaired.table.copies() == 1).all()
  served = np.bincount(repaired.table.entries[:, 0, 0], minlength=8)
  assert served.max() - served[3:].min() <= 2
  assert not served[:3].any()


def test_tarragon_restores_only_the_requests_of_a_lost_attention_rank():
  view, plan = recovered("tarragon", ATTENTION, FREE)
  assert set(plan.paused) == on(view, 0)
  (restore,) = only(plan.resume, rm.RestoreKV)
  assert restore.tier == rm.Tier.HOST
  assert set(restore.to) <= {1, 2}
  waiting = {n for a in only(plan.resume, rm.Requeue) for n in a.requests}
  assert set(restore.requests) | waiting == on(view, 0)
  assert not only(plan.resume, rm.RecomputePrefix)
  after, _ = done(view, plan)
  assert len(after.requests.request_id) == len(view.requests.request_id)


def test_a_link_matters_only_if_it_was_the_way_to_a_last_copy():
  for name in ("tarragon", "kv_restore", "revive_moe"):
    _, answer = recovered(name, rm.LinkLost(1, 4), FREE)
    assert "all experts of rank 4 have another copy" in answer.reason
  view, plan = recovered("mesh_shrink", rm.LinkLost(1, 4), FREE)
  assert plan.resume[0] == rm.Fence((4,))
  after, _ = done(view, plan)
  assert 4 not in after.mesh
  assert 1 in after.mesh
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert copy.tier == rm.Tier.HOST
  with pytest.raises(ValueError, match=r"names rank 11; known: 0\.\.7"):
    recovered("mesh_shrink", rm.LinkLost(1, 11), FREE)


def test_a_mesh_without_attention_ranks_serves_nobody():
  view = cases.serving(rm.load("mesh_shrink"), FREE)
  only_experts = rm.RebuildMesh(tuple(range(3, 8)))
  left = rm.advance_all(view, [rm.Requeue(view.requests.request_id)])
  left = rm.advance(left, only_experts)
  assert "0 of 5 ranks in the mesh are for requests" in rm.servable(left)


def test_revive_moe_promotes_replicas_first():
  _, plan = recovered("revive_moe", EXPERT, FREE, mask_from=5)
  assert kinds(plan.resume) == [rm.Fence, rm.RebuildMesh]
  assert plan.paused == ()
  _, plan = recovered("revive_moe", ATTENTION, FREE)
  assert only(plan.resume, rm.RecomputePrefix)


def test_revive_moe_masks_from_so_many_expert_ranks_on():
  view, plan = recovered("revive_moe", EXPERT, FREE, replicas=0, mask_from=5)
  (mask,) = only(plan.resume, rm.MaskExperts)
  assert mask.experts == (0, 1, 2, 3)
  assert plan.paused == ()
  _, repaired = done(view, plan)
  assert not repaired.masked.any()
  assert not rm.load("revive_moe", mask_from=5).lossless
  assert rm.load("revive_moe").lossless
  _, plan = recovered("revive_moe", EXPERT, FREE, replicas=0, mask_from=6)
  assert not only(plan.resume, rm.MaskExperts), "only 5 are expert ranks"


def test_revive_moe_switches_a_role_else_and_reads_from_disk():
  lost = rm.RanksLost((2, 3))
  view, plan = recovered("revive_moe", lost, FULL, replicas=0)
  (switch,) = only(plan.resume, rm.SwitchRole)
  assert switch.role == rm.Role.EXPERT
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert copy.tier == rm.Tier.DISK
  assert set(plan.paused) == on(view, 0) | on(view, 1)


def test_revive_moe_restarts_at_last():
  lost = rm.RanksLost((2, 3, 4))
  _, plan = recovered("revive_moe", lost, FULL, replicas=0)
  assert kinds(plan.resume) == [rm.Fence, rm.RestartInstance]
  assert plan.resume[1].cache


def test_masked_experts_without_room_come_back_with_the_replacements():
  lost = rm.RanksLost((3, 4))
  view, plan = recovered("mask_experts", lost, FREE)
  _, repaired = done(view, plan)
  assert repaired.masked.sum() == 4, "7 lost, 3 slots free"
  view, plan = recovered("mask_experts", lost, FREE, replace=True)
  _, repaired = done(view, plan)
  assert not repaired.masked.any()


def test_experts_brought_back_by_an_abandoned_repair_count_as_left():
  policy = rm.load("mask_experts", min_live=5)
  first, second = rm.RanksLost((2,)), rm.RanksLost((4,))
  view = cases.after(cases.serving(policy, FULL), first)
  plan = rm.recover_checked(policy, view, first)
  view = rm.advance_all(view, rm.ordered(plan.resume))
  (copy,) = only(plan.repair, rm.CopyExperts)
  view = rm.advance(view, copy)  # and not the table
  assert view.masked.sum() == 2
  view = cases.after(view, second)
  plan = rm.recover_checked(policy, view, second)
  assert isinstance(plan, rm.Plan), plan
  steps = kinds(rm.ordered(plan.resume))
  assert steps.index(rm.RemapExperts) < steps.index(rm.MaskExperts)


@pytest.mark.parametrize("name", ["mesh_shrink", "retry"])
def test_experts_that_nobody_holds_stop_everybody(name):
  view, plan = recovered(name, EXPERT, FREE)
  running = (view.requests.rank >= 0).sum()
  assert len(plan.paused) == running
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert copy.tier == rm.Tier.HOST


@pytest.mark.parametrize("name", ["mesh_shrink", "tarragon", "mask_experts"])
def test_an_expert_rank_that_leaves_stops_nobody(name):
  view, plan = recovered(name, rm.RanksLeaving((3,), 2.0), FREE)
  assert plan.paused == ()
  for action in only(plan.resume, rm.CopyExperts):
    assert action.tier == rm.Tier.PEER
  after, repaired = done(view, plan)
  assert 3 not in after.mesh
  assert rm.Fence((3,)) in plan.repair


def test_what_only_a_spare_still_holds_stops_everybody():
  """A leaving rank was out of the mesh already when another one is lost."""
  policy = rm.load("mesh_shrink")
  view = cases.serving(policy, FREE)
  left = tuple(r for r in range(8) if r != 3)
  view = rm.advance(view, rm.RebuildMesh(left))
  lost = rm.RanksLost((0,))
  plan = rm.recover_checked(policy, cases.after(view, lost), lost)
  (copy,) = only(plan.resume, rm.CopyExperts)
  assert {m.source for m in copy.moves} == {3}
  assert len(plan.paused) == (view.requests.rank >= 0).sum()


def test_retry_ends_only_the_requests_of_a_lost_attention_rank():
  view, plan = recovered("retry", ATTENTION, FREE)
  (ended,) = only(plan.resume, rm.FailRequests)
  assert set(ended.requests) == on(view, 0) == set(plan.paused)
  _, plan = recovered("retry", EXPERT, FREE)
  assert not only(plan.resume, rm.FailRequests)


def test_kv_lies_on_the_next_attention_rank():
  view, plan = recovered("kv_restore", ATTENTION, FREE)
  holders = view.requests.checkpoint_rank[view.requests.on([0])]
  assert set(holders.tolist()) == {1}
  (restore,) = only(plan.resume, rm.RestoreKV)
  assert restore.tier == rm.Tier.PEER
  lost = rm.RanksLost((0, 1))
  view, plan = recovered("kv_restore", lost, FREE, requests=3)
  (again,) = only(plan.resume, rm.RecomputePrefix)
  assert set(again.requests) == on(view, 0)
  (restore,) = only(plan.resume, rm.RestoreKV)
  assert set(restore.requests) == on(view, 1), "those lie on rank 2"


def test_restart_restarts_everybody():
  view, plan = recovered("restart_cached", EXPERT, FREE)
  assert set(plan.paused) == set(view.requests.request_id)
  _, answer = recovered("restart_cached", rm.RanksLost((0, 1, 2)), FREE)
  assert answer.reason == "0 of 8 ranks are left for requests; at least 1"


def test_the_cheapest_promotes_and_restores():
  _, plan = recovered("cheapest", EXPERT, FREE)
  assert not only(plan.resume, rm.CopyExperts)
  assert plan.paused == ()
  _, plan = recovered("cheapest", ATTENTION, FREE)
  assert only(plan.resume, rm.RestoreKV)


def test_in_a_union_whoever_is_for_another_deployment_is_left_out():
  view = cases.serving(rm.load("mesh_shrink"), FREE)
  lost = cases.after(view, EXPERT)
  line = rm.first_feasible(rm.load("none"), rm.load("eep"))
  assert line.deployments == rm.DEPLOYMENTS, "as the first of them"
  answer = line.recover(lost, EXPERT)
  assert "policy 'eep' is for collocated deployments" in answer.reason
  first = rm.first_feasible(rm.load("tarragon"), rm.load("restart"))
  assert first.deployments == ("disaggregated",)
  with pytest.raises(ValueError, match="is for disaggregated deployments, not"):
    first.prepare(rm.bare_view(8, 16))
  some = rm.cheapest([rm.load("eep"), rm.load("tarragon")], lambda p, v: 0.0)
  assert some.deployments == rm.DEPLOYMENTS
  alone = cases.serving(rm.load("tarragon"), FREE)
  assert cases.serving(some, FREE).slots_per_rank == alone.slots_per_rank


def test_a_link_whose_rank_knows_of_no_other_copy_costs_the_expert_rank():
  """As where the links to both holders are cut: each has "another" copy."""
  tolerated = rm.LinkLost(1, 4, elsewhere=True)
  _, answer = recovered("tarragon", tolerated, FREE)
  assert isinstance(answer, rm.Infeasible)
  _, plan = recovered("tarragon", rm.LinkLost(1, 4, elsewhere=False), FREE)
  assert [a.ranks for a in only(plan.resume, rm.Fence)] == [(4,)]


def test_where_no_expert_rank_can_be_spared_the_attention_rank_goes():
  policy = rm.load("mesh_shrink", losses=0)
  view = cases.serving(policy, FULL)
  answer = rm.recover_checked(policy, view, rm.RanksLost((3,)))
  assert isinstance(answer, rm.Infeasible), "no slots for its experts"
  plan = rm.recover_checked(policy, view, rm.LinkLost(1, 3, elsewhere=False))
  assert [a.ranks for a in only(plan.resume, rm.Fence)] == [(1,)]
