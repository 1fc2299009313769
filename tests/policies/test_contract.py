"""What every policy must keep, over all files in `policies/`.

RMOE_POLICY=my_module.my_policy runs the same tests over another one.
"""

import dataclasses
import os

import numpy as np
import pytest

from resilient_moe import recovery as rm
from tests.recovery import cases

OUTSIDE = os.environ.get("RMOE_POLICY")
NAMES = [OUTSIDE] if OUTSIDE else rm.policy_names()
FAILURES = ("first", "last", "two", "leaving", "slow", "spare")


@pytest.fixture(params=NAMES)
def policy(request):
  return rm.load(request.param)


@pytest.fixture(params=cases.SIZES)
def size(request):
  return request.param


def question(policy, size, kind):
  """A view and the failure of this kind, if the size has one."""
  view = cases.serving(policy, size)
  failure = cases.failures(view).get(kind)
  if failure is None:
    return None
  return cases.after(view, failure), failure


def moved(plan):
  """Ids that the plan moves, ends or queues."""
  return {n for a in plan.resume for n in getattr(a, "requests", ())}


def test_the_list_is_the_folder():
  assert {"none", "restart_cached", "kv_restore"} <= set(rm.policy_names())


def test_what_stands_can_be_served(policy, size):
  view = cases.serving(policy, size)
  bare = rm.bare_view(spares=policy.spares, **cases.SIZES[size])
  standing = policy.prepare(bare)
  assert rm.servable(view) is None
  assert not view.masked.any()
  assert standing.slots.shape[0] == len(view.status)
  assert standing.rows_per_rank >= bare.rows_per_rank
  assert standing.checkpoint in ("none", "peer", "host")
  assert all(isinstance(name, frozenset) for name in standing.ready)
  for name in standing.ready:
    assert len(rm.mesh_named(view.launched, name))


def test_ready_meshes_are_the_ones_a_single_loss_needs(policy):
  view = cases.serving(policy, "8x16")
  lost = rm.RanksLost((3,))
  plan = policy.recover(cases.after(view, lost), lost)
  if isinstance(plan, rm.Infeasible):
    return
  fetched = [a for a in plan.resume if isinstance(a, rm.FetchExecutable)]
  for action in fetched:
    # `not_ready` is there to show what that costs.
    ready = action.absent in view.ready
    assert ready == (policy.name != "not_ready"), "not ready, though likely"


@pytest.mark.parametrize("kind", FAILURES)
def test_the_plan_is_legal_and_service_goes_on(policy, size, kind):
  asked = question(policy, size, kind)
  if asked is None:
    return
  view, failure = asked
  plan = rm.recover_checked(policy, view, failure)
  if isinstance(plan, rm.Infeasible):
    assert plan.reason
    return
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert rm.servable(after) is None
  assert not (policy.lossless and after.masked.any())
  assert moved(plan) <= set(plan.paused)
  ended = set(view.requests.request_id) - set(after.requests.request_id)
  assert not ended or policy.fails_requests
  repaired = rm.advance_all(after, rm.ordered(plan.repair))
  assert rm.servable(repaired) is None
  if isinstance(failure, rm.RanksLost | rm.RanksLeaving):
    assert not set(failure.ranks) & set(repaired.mesh.tolist())
    assert (repaired.status[list(failure.ranks)] == rm.Status.LOST).all()
  assert after.epoch > view.epoch


@pytest.mark.parametrize("kind", FAILURES)
def test_the_same_question_gets_the_same_answer_and_is_not_written_to(
  policy, size, kind
):
  asked = question(policy, size, kind)
  if asked is None:
    return
  view, failure = asked
  before = cases.frozen(view)
  answers = [cases.frozen(policy.recover(view, failure)) for _ in range(2)]
  assert answers[0] == answers[1]
  assert cases.frozen(view) == before, "recover wrote to its view"
  bare = rm.bare_view(spares=policy.spares, **cases.SIZES[size])
  before = cases.frozen(bare)
  standing = [cases.frozen(policy.prepare(bare)) for _ in range(2)]
  assert standing[0] == standing[1]
  assert cases.frozen(bare) == before, "prepare wrote to its view"


@pytest.mark.parametrize("stop", range(9))
def test_a_failure_in_mid_plan_is_planned_from(policy, stop):
  view = cases.serving(policy, "8x16")
  first, second = rm.RanksLost((3,)), rm.RanksLost((5,))
  view = cases.after(view, first)
  plan = rm.recover_checked(policy, view, first)
  if isinstance(plan, rm.Infeasible):
    return
  steps = rm.ordered(plan.resume) + rm.ordered(plan.repair)
  view = rm.advance_all(view, steps[:stop])
  view = cases.after(view, second)
  assert rm.plannable(view) is None
  plan = rm.recover_checked(policy, view, second)
  if isinstance(plan, rm.Infeasible):
    return
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert not {3, 5} & set(after.mesh.tolist())


def test_losing_everybody_is_infeasible_with_value_and_limit(policy):
  view = cases.serving(policy, "3x7")
  everyone = rm.RanksLost(tuple(range(len(view.status))))
  answer = rm.recover_checked(policy, cases.after(view, everyone), everyone)
  assert isinstance(answer, rm.Infeasible)
  assert any(c.isdigit() for c in answer.reason)


def test_a_report_that_the_view_has_not_seen_yet_is_believed(policy):
  view = cases.serving(policy, "8x16")
  lost = rm.RanksLost((3,))
  late = rm.recover_checked(policy, view, lost)
  known = rm.recover_checked(policy, cases.after(view, lost), lost)
  if isinstance(known, rm.Plan) and isinstance(late, rm.Plan):
    assert cases.frozen(late) == cases.frozen(known)


def test_more_requests_than_rows_are_queued_not_lost(policy):
  view = cases.serving(policy, "8x16", requests=60)
  lost = rm.RanksLost((3,))
  view = cases.after(view, lost)
  plan = rm.recover_checked(policy, view, lost)
  if isinstance(plan, rm.Infeasible):
    return
  after = rm.advance_all(view, rm.ordered(plan.resume))
  if not policy.fails_requests:
    assert after.requests.request_id == view.requests.request_id
    queued = (after.requests.rank < 0).sum()
    held = np.bincount(after.requests.rank[after.requests.rank >= 0])
    assert queued + held.sum() == 60


def test_a_lossless_policy_never_masks(policy):
  if not policy.lossless:
    return
  view = cases.serving(policy, "8x16")
  for failure in cases.failures(view).values():
    plan = policy.recover(cases.after(view, failure), failure)
    for action in getattr(plan, "resume", ()) + getattr(plan, "repair", ()):
      assert not isinstance(action, rm.MaskExperts)


def test_the_price_and_the_explanation_can_be_had(policy):
  view = cases.serving(policy, "8x16")
  for failure in cases.failures(view).values():
    left = cases.after(view, failure)
    plan = policy.recover(left, failure)
    if isinstance(plan, rm.Plan):
      assert rm.explain_plan(plan)
      price = rm.price_plan(plan, left, rm.THIS_MACHINE)
      assert price.resume.seconds >= 0


def test_the_promise_is_declared(policy):
  assert policy.name
  assert dataclasses.is_dataclass(policy)
  assert policy.spares >= 0
