"""What every policy must keep, over all files in `policies/`.

Each is asked where it says that it can be used: every deployment it declares,
at every size, about every failure.
RMOE_POLICY=my_module.my_policy runs the same tests over another one.
"""

import dataclasses
import functools
import os

import numpy as np
import pytest

from resilient_moe import recovery as rm
from tests.recovery import cases

OUTSIDE = os.environ.get("RMOE_POLICY")
NAMES = [OUTSIDE] if OUTSIDE else rm.policy_names()
PLACES = [(n, size) for n in NAMES for size in cases.sizes(rm.load(n))]
MEDIUM = [(n, size) for n, size in PLACES if size in cases.MEDIUM]


def _kinds(name, size):
  return cases.failures(cases.bare(rm.load(name), size))


QUESTIONS = [(n, size, kind) for n, size in PLACES for kind in _kinds(n, size)]
APART = [q for q in QUESTIONS if q[1] in cases.APART]

# Whoever holds experts in reserve for one loss, or brings them from somewhere.
RECOVERS = {
  "expert", "attention", "both", "leaving expert", "leaving attention",
  "first", "last", "leaving",
}  # fmt: skip


def named(cases_):
  return ["-".join(case) for case in cases_]


@pytest.fixture(params=PLACES, ids=named(PLACES))
def place(request):
  name, size = request.param
  return rm.load(name), size


@pytest.fixture(params=MEDIUM, ids=named(MEDIUM))
def medium(request):
  name, size = request.param
  return rm.load(name), size


@functools.cache
def standing(name, size):
  policy = rm.load(name)
  return policy, cases.serving(policy, size)


def asked(name, size, kind):
  """A policy, the view when the failure is reported, and the failure."""
  policy, view = standing(name, size)
  failure = cases.failures(view)[kind]
  return policy, cases.after(view, failure), failure


@pytest.fixture(params=QUESTIONS, ids=named(QUESTIONS))
def question(request):
  return asked(*request.param)


@pytest.fixture(params=APART, ids=named(APART))
def question_apart(request):
  return asked(*request.param)


def moved(plan):
  """Ids that the plan moves, ends or queues."""
  return {n for a in plan.resume for n in getattr(a, "requests", ())}


def launched(plan):
  return {a.rank for a in plan.repair if isinstance(a, rm.LaunchRank)}


def lost_one(view):
  """The loss of a rank that holds experts, from the middle."""
  rank = 3
  assert view.role[rank] != rm.Role.ATTENTION
  return rm.RanksLost((rank,))


def test_the_list_is_the_folder():
  assert {"none", "restart_cached", "kv_restore"} <= set(rm.policy_names())


def test_every_deployment_is_asked():
  here = {size in cases.APART for _, size in PLACES}
  assert OUTSIDE or here == {False, True}


def test_what_stands_can_be_served(place):
  policy, size = place
  view = cases.serving(policy, size)
  bare = cases.bare(policy, size)
  standing = policy.prepare(bare)
  assert rm.servable(view) is None
  assert not view.masked.any()
  assert standing.slots.shape[0] == len(view.status)
  assert standing.rows_per_rank >= bare.rows_per_rank
  assert standing.checkpoint in ("none", "peer", "host")
  assert all(isinstance(name, frozenset) for name in standing.ready)
  for name in standing.ready:
    assert len(rm.mesh_named(view.launched, name))
  attend = view.role == rm.Role.ATTENTION
  assert (standing.slots[attend] == -1).all(), "experts where nobody holds any"
  assert not (view.disaggregated and standing.ready), "no mesh has programs"


@pytest.mark.parametrize("name", NAMES)
def test_elsewhere_it_says_where_it_is_for(name):
  policy = rm.load(name)
  assert policy.deployments
  assert set(policy.deployments) <= set(rm.DEPLOYMENTS)
  for here, size in zip(rm.DEPLOYMENTS, cases.MEDIUM, strict=True):
    if here in policy.deployments:
      continue
    (meant,) = policy.deployments
    reason = f"policy '{policy.name}' is for {meant} deployments, not {here}"
    view = cases.serving(rm.load("mesh_shrink"), size)
    lost = lost_one(view)
    left = cases.after(view, lost)
    assert rm.recover_checked(policy, left, lost) == rm.Infeasible(reason)
    with pytest.raises(ValueError, match=reason):
      cases.serving(policy, size)
    if not OUTSIDE:  # composed ones say it by themselves
      assert policy.recover(left, lost) == rm.Infeasible(reason)
      with pytest.raises(ValueError, match=reason):
        policy.prepare(cases.bare(policy, size))


def test_ready_meshes_are_the_ones_a_single_loss_needs(medium):
  policy, size = medium
  view = cases.serving(policy, size)
  lost = lost_one(view)
  plan = policy.recover(cases.after(view, lost), lost)
  if isinstance(plan, rm.Infeasible):
    return
  fetched = [a for a in plan.resume if isinstance(a, rm.FetchExecutable)]
  assert not (view.disaggregated and fetched)
  for action in fetched:
    # `not_ready` is there to show what that costs.
    ready = action.absent in view.ready
    assert ready == (policy.name != "not_ready"), "not ready, though likely"


def test_the_plan_is_legal_and_service_goes_on(question):
  policy, view, failure = question
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
  assert after.epoch > view.epoch
  if isinstance(failure, rm.RanksLost | rm.RanksLeaving):
    gone = set(failure.ranks)
    assert not gone & set(after.mesh.tolist())
    # Who is there again is another process.
    assert gone & set(repaired.mesh.tolist()) <= launched(plan)
    left_out = sorted(gone - launched(plan))
    assert (repaired.status[left_out] == rm.Status.LOST).all()


@pytest.mark.parametrize(
  ("name", "size", "kind"),
  [q for q in QUESTIONS if q[2] in RECOVERS and not OUTSIDE],
)
def test_one_loss_is_recovered_from_if_somebody_is_left(name, size, kind):
  policy, view, failure = asked(name, size, kind)
  answer = rm.recover_checked(policy, view, failure)
  attend = np.flatnonzero(view.role != rm.Role.EXPERT)
  left = len(np.setdiff1d(attend, failure.ranks))
  needed = 1
  if name == "role_switch" and size != "3+5x16":  # which has free slots
    needed += "expert" in kind or kind == "both"
  impossible = name == "none" or left < needed
  assert isinstance(answer, rm.Infeasible) == impossible, answer


def test_apart_only_those_wait_who_have_to(question_apart):
  policy, view, failure = question_apart
  plan = rm.recover_checked(policy, view, failure)
  if isinstance(plan, rm.Infeasible):
    return
  actions = plan.resume + plan.repair
  assert not any(isinstance(a, rm.FetchExecutable) for a in actions)
  if any(isinstance(a, rm.RestartInstance) for a in plan.resume):
    return
  left = view
  if isinstance(failure, rm.LinkLost):  # the rank is given up
    left = rm.lose(view, (failure.expert,))
  copied = {
    m.expert for a in plan.resume if isinstance(a, rm.CopyExperts)
    for m in a.moves
  }  # fmt: skip
  served = set(left.slots[left.status == rm.Status.SERVING].ravel().tolist())
  pairs = zip(view.requests.request_id, view.requests.rank, strict=True)
  running = {name for name, rank in pairs if rank >= 0}
  waits = running if copied - served else moved(plan)
  assert set(plan.paused) == waits


def test_whoever_grows_back_is_what_it_was(question):
  policy, view, failure = question
  plan = rm.recover_checked(policy, view, failure)
  if isinstance(plan, rm.Infeasible) or not launched(plan):
    return
  done = rm.ordered(plan.resume) + rm.ordered(plan.repair)
  repaired = rm.advance_all(view, done)
  assert repaired.mesh.tolist() == list(view.launched)
  assert (repaired.role == repaired.home).all()


def test_the_same_question_gets_the_same_answer_and_is_not_written_to(
  question,
):
  policy, view, failure = question
  before = cases.frozen(view)
  answers = [cases.frozen(policy.recover(view, failure)) for _ in range(2)]
  assert answers[0] == answers[1]
  assert cases.frozen(view) == before, "recover wrote to its view"


def test_preparing_twice_is_the_same(place):
  policy, size = place
  bare = cases.bare(policy, size)
  before = cases.frozen(bare)
  standing = [cases.frozen(policy.prepare(bare)) for _ in range(2)]
  assert standing[0] == standing[1]
  assert cases.frozen(bare) == before, "prepare wrote to its view"


@pytest.mark.parametrize("then", [0, 5])
def test_a_failure_in_mid_plan_is_planned_from(medium, then):
  policy, size = medium
  start = cases.serving(policy, size)
  first, second = lost_one(start), rm.RanksLost((then,))
  start = cases.after(start, first)
  plan = rm.recover_checked(policy, start, first)
  if isinstance(plan, rm.Infeasible):
    return
  steps = rm.ordered(plan.resume) + rm.ordered(plan.repair)
  for stop in range(len(steps) + 1):
    view = cases.after(rm.advance_all(start, steps[:stop]), second)
    assert rm.plannable(view) is None
    again = rm.recover_checked(policy, view, second)
    if isinstance(again, rm.Infeasible):
      continue
    after = rm.advance_all(view, rm.ordered(again.resume))
    assert then not in after.mesh, f"after {stop} of {len(steps)} actions"


@pytest.mark.parametrize("who", ["everybody", "all attention"])
def test_losing_all_of_them_is_infeasible_with_value_and_limit(place, who):
  policy, size = place
  view = cases.serving(policy, size)
  everyone = rm.RanksLost(tuple(range(len(view.status))))
  lost = cases.failures(view).get(who, everyone)
  answer = rm.recover_checked(policy, cases.after(view, lost), lost)
  assert isinstance(answer, rm.Infeasible)
  assert any(c.isdigit() for c in answer.reason)


def test_a_report_that_the_view_has_not_seen_yet_is_believed(medium):
  policy, size = medium
  view = cases.serving(policy, size)
  for failure in cases.failures(view).values():
    if isinstance(failure, rm.RanksLost):
      late = rm.recover_checked(policy, view, failure)
      known = rm.recover_checked(policy, cases.after(view, failure), failure)
      assert cases.frozen(late) == cases.frozen(known)


def test_more_requests_than_rows_are_queued_not_lost(medium):
  policy, size = medium
  view = cases.serving(policy, size, requests=60)
  for failure in cases.failures(view).values():
    left = cases.after(view, failure)
    plan = rm.recover_checked(policy, left, failure)
    if isinstance(plan, rm.Infeasible) or policy.fails_requests:
      continue
    after = rm.advance_all(left, rm.ordered(plan.resume))
    assert after.requests.request_id == view.requests.request_id
    queued = (after.requests.rank < 0).sum()
    held = np.bincount(after.requests.rank[after.requests.rank >= 0])
    assert queued + held.sum() == 60


def test_a_lossless_policy_never_masks(medium):
  policy, size = medium
  if not policy.lossless:
    return
  view = cases.serving(policy, size)
  for failure in cases.failures(view).values():
    plan = policy.recover(cases.after(view, failure), failure)
    for action in getattr(plan, "resume", ()) + getattr(plan, "repair", ()):
      assert not isinstance(action, rm.MaskExperts)


def test_the_price_and_the_explanation_can_be_had(question):
  policy, view, failure = question
  plan = policy.recover(view, failure)
  if isinstance(plan, rm.Plan):
    assert rm.explain_plan(plan)
    price = rm.price_plan(plan, view, rm.THIS_MACHINE)
    assert price.resume.seconds >= 0


@pytest.mark.parametrize("name", NAMES)
def test_the_promise_is_declared(name):
  policy = rm.load(name)
  assert policy.name
  assert dataclasses.is_dataclass(policy)
  assert policy.spares >= 0
