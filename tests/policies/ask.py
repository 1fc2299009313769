"""Asking a policy, for the tests of what each one promises."""

from resilient_moe import recovery as rm
from tests.recovery import cases

LOST = rm.RanksLost((3,))


def recovered(name, failure=LOST, size="8x16", requests=0, **kwargs):
  """The view at the failure, and the plan."""
  policy = rm.load(name, **kwargs)
  view = cases.serving(policy, size, requests)
  view = cases.after(view, failure)
  return view, rm.recover_checked(policy, view, failure)


def kinds(actions):
  return [type(a) for a in actions]


def only(actions, kind):
  return [a for a in actions if isinstance(a, kind)]


def on(view, rank):
  """Ids of the requests that sit on `rank`."""
  return {view.requests.request_id[i] for i in view.requests.on([rank])}


def done(view, plan):
  """The views after `resume` and after `repair`."""
  after = rm.advance_all(view, rm.ordered(plan.resume))
  return after, rm.advance_all(after, rm.ordered(plan.repair))
