"""`serve` through failures at any step, of any rank, and during recovery."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.report import History
from resilient_moe.report.history import of_kind
from resilient_moe.serving.carry import EngineRestart
from resilient_moe.serving.loop import serve
from resilient_moe.serving.recover import Unrecoverable
from resilient_moe.serving.request import Request
from tests.serving import fake
from tests.serving.runs import (
  POLICIES,
  RANKS,
  Intake,
  begun,
  check,
  run,
  some_requests,
)


def test_without_faults_everybody_is_answered(rng):
  requests = some_requests(rng)
  history, backend = run("none", requests)
  check(history, requests)
  assert not of_kind(history, "step_failed")
  numbers = [b.number for b in backend.batches]
  assert numbers == sorted(set(numbers))
  emitted = 0
  for batch, event in zip(
    backend.batches, of_kind(history, "step"), strict=True
  ):
    assert batch.emitted == emitted
    emitted += len(event["emitted"])


@pytest.mark.parametrize("name", POLICIES)
def test_a_loss_at_any_step_of_any_rank_changes_no_token(name, rng):
  requests = some_requests(rng)
  for step in range(0, 24, 2):
    rank = int(rng.integers(RANKS))
    history, _ = run(name, requests, lose_at={step: (rank,)})
    check(history, requests, fails=name == "retry")
    if of_kind(history, "step_failed"):  # the run was not over before
      assert len(of_kind(history, "resumed")) == 1
      assert of_kind(history, "redundancy")


@pytest.mark.parametrize("name", POLICIES)
def test_losses_one_after_another_and_during_recovery(name, rng):
  requests = some_requests(rng)
  for _ in range(12):
    first, second = rng.permutation(RANKS)[:2]
    step, later = int(rng.integers(0, 16)), int(rng.integers(1, 8))
    if rng.random() < 0.5:
      faults = {"lose_in_recovery": {int(rng.integers(1, 5)): (int(second),)}}
      lose_at = {step: (int(first),)}
    else:
      faults = {}
      lose_at = {step: (int(first),), step + later: (int(second),)}
    history, _ = run(name, requests, 2, lose_at=lose_at, **faults)
    check(history, requests, fails=name == "retry")


def test_failure_during_recovery_replaces_the_plan(rng):
  requests = some_requests(rng)
  history, backend = run(
    "mesh_shrink", requests, 2, lose_at={4: (1,)}, lose_in_recovery={2: (3,)}
  )
  check(history, requests)
  assert len(of_kind(history, "plan")) == 2
  assert len(of_kind(history, "resumed")) == 1
  done = of_kind(history, "action")
  first = [e for e in done if e["part"] == "resume"][:3]
  assert [e["name"] for e in first].count("Fence") == 2  # nothing in between
  assert backend.view().mesh.tolist() == [0, 2]


def test_losses_reported_together_are_one_failure(rng):
  requests = some_requests(rng)
  history, _ = run("mesh_shrink", requests, 2, lose_at={5: (0, 2)})
  check(history, requests)
  assert [f["ranks"] for f in of_kind(history, "failure")] == [[0, 2]]


def test_restored_kv_is_not_prefilled_again(rng):
  requests = [
    dataclasses.replace(r, arrival_step=0, max_new_tokens=30, stop=())
    for r in some_requests(rng, 8)
  ]
  moved = {}
  for name in ("replica_promotion", "kv_restore-host"):
    history, _ = run(name, requests, lose_at={15: (2,)})
    check(history, requests)
    moved[name] = sum(e["tokens"] for e in of_kind(history, "requests_moved"))
  assert moved["replica_promotion"] > 0
  assert moved["kv_restore-host"] == 0  # all were in decode, and streamed


def test_rank_that_leaves_is_drained_without_losing_a_token(rng):
  requests = some_requests(rng)
  for name in ("mesh_shrink", "kv_restore"):
    history, backend = run(name, requests, leave_at={9: (1,)})
    check(history, requests)
    assert 1 not in backend.view().mesh
    assert not of_kind(history, "step_failed")


def test_requests_of_a_leaving_rank_take_their_kv_with_them(rng):
  requests = some_requests(rng)
  history, backend = run("mesh_shrink", requests, leave_at={9: (1,)})
  restores = [
    e for e in of_kind(history, "requests_moved") if e["kind"] == "restore"
  ]
  assert sum(len(e["request_ids"]) for e in restores) > 0
  assert backend.handed_over == sum(len(e["request_ids"]) for e in restores)


def test_engine_that_was_restarted_goes_on_where_the_other_ended(rng):
  requests = some_requests(rng)
  policy = rm.load("restart_cached")
  view = fake.bare(RANKS)
  history = begun(policy, requests)
  backend = fake.FakeBackend(view, policy.prepare(view), lose_at={9: (2,)})
  intake = Intake(requests)
  with pytest.raises(EngineRestart) as restart:
    serve(intake, backend, policy, history.write, chunk=5)
  kept = restart.value.state.sequences.values()
  already = {s.request.request_id: s.tokens for s in kept}
  assert any(already.values())
  again = [dataclasses.replace(s.request, arrival_step=0) for s in kept]
  mesh = restart.value.action.ranks
  assert 2 not in mesh
  view = fake.bare(len(mesh))
  fresh = fake.FakeBackend(view, policy.prepare(view))
  serve(
    Intake(again + intake.waiting, already), fresh, policy, history.write,
    chunk=5, first_step=9,
  )  # fmt: skip
  check(history, requests)


def test_losing_what_no_policy_can_replace_ends_with_the_reason(rng):
  requests = some_requests(rng)
  with pytest.raises(Unrecoverable, match=r"rank\(s\) \[0\].*none"):
    run("none", requests, lose_at={3: (0,)})


def test_losing_more_ranks_than_promised_is_unrecoverable(rng):
  requests = some_requests(rng)
  lost = {3: tuple(range(RANKS))}
  with pytest.raises(Unrecoverable, match="mesh_shrink"):
    run("mesh_shrink", requests, lose_at=lost)


def test_idle_engine_skips_to_the_next_arrival():
  request = Request("late", (1,), 2, arrival_step=1000)
  intake, policy = Intake([request]), rm.load("none")
  looks = mock.patch.object(intake, "poll", wraps=intake.poll)
  backend = fake.FakeBackend(fake.bare(2), policy.prepare(fake.bare(2)))
  with looks as poll:
    serve(intake, backend, policy, History().write, chunk=5)
  assert [b.number for b in backend.batches] == [1000, 1001]
  assert poll.call_count < 10


def test_fake_model_would_notice_a_lost_token():
  """The test's own test: other KV gives other text."""
  request = Request("x", (1, 2, 3, 4), 5)
  changed = dataclasses.replace(request, prompt=(1, 2, 3, 5))
  assert fake.answer(request) != fake.answer(changed)
  with pytest.raises(AssertionError, match="nobody computed"):
    fake.says(np.array([1, fake.EMPTY]), 0)
