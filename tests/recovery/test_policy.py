"""Combinators, and policies found by name."""

import dataclasses
import re
import sys
import types

import pytest

from resilient_moe import recovery as rm
from tests.recovery import cases

LOST = rm.RanksLost((3,))


def test_an_unknown_name_is_an_error_with_the_choices():
  message = re.escape(f"unknown policy 'kv_restor'; choices: {'cheapest, '}")
  with pytest.raises(ValueError, match=message):
    rm.load("kv_restor")
  with pytest.raises(ValueError, match="unknown policy 'no.such.module'"):
    rm.load("no.such.module")
  with pytest.raises(ValueError, match="unknown policy 'policies.retry.maker'"):
    rm.load("policies.retry.maker")
  with pytest.raises(ValueError, match="unknown policy ''"):
    rm.load("")


def test_an_unknown_keyword_is_an_error_with_the_choices():
  with pytest.raises(ValueError, match="'colour'; keywords: losses, ready, h"):
    rm.load("mesh_shrink", colour="red")


def test_bad_values_are_errors_with_the_limit():
  with pytest.raises(ValueError, match="ready='some'; choices: none, singles"):
    rm.load("mesh_shrink", ready="some").prepare(rm.bare_view(8, 16))
  with pytest.raises(ValueError, match="losses=8: of 8 ranks at most 7 may go"):
    rm.load("mesh_shrink", losses=8).prepare(rm.bare_view(8, 16))
  with pytest.raises(ValueError, match="checkpoint='tape'; choices: host"):
    rm.load("kv_restore", checkpoint="tape")
  with pytest.raises(ValueError, match="replicas=-1; choices: 'all' or"):
    rm.load("replica_promotion", replicas=-1)
  view = cases.serving(rm.load("mesh_shrink"), "8x16")
  with pytest.raises(ValueError, match=r"names rank 9; known: 0\.\.7"):
    rm.load("mesh_shrink").recover(view, rm.RanksLost((9,)))


@pytest.fixture
def outside(monkeypatch):
  """A module `outside.mine` as a user would have it."""
  package = types.ModuleType("outside")
  module = types.ModuleType("outside.mine")
  package.__path__ = []
  module.make = lambda losses=1: rm.load("mesh_shrink", losses=losses)
  module.ready_made = rm.load("restart")
  module.wrong = lambda: 42
  monkeypatch.setitem(sys.modules, "outside", package)
  monkeypatch.setitem(sys.modules, "outside.mine", module)


@pytest.mark.usefixtures("outside")
def test_policies_outside_the_tree_are_found_by_dotted_path():
  assert rm.load("outside.mine", losses=2).name == "mesh_shrink"
  assert rm.load("outside.mine.make").name == "mesh_shrink"
  assert rm.load("outside.mine.ready_made").name == "restart"
  with pytest.raises(ValueError, match="is a policy already; it takes no"):
    rm.load("outside.mine.ready_made", losses=2)
  with pytest.raises(ValueError, match="made a int, not a policy"):
    rm.load("outside.mine.wrong")


def test_first_feasible_asks_in_turn_and_keeps_the_larger_reserve():
  none, shrink = rm.load("none"), rm.load("mesh_shrink")
  both = rm.first_feasible(none, shrink)
  assert both.name == "none+mesh_shrink"
  view = cases.serving(both, "8x16")
  alone = cases.serving(shrink, "8x16")
  assert view.slots_per_rank == alone.slots_per_rank == 3
  assert view.rows_per_rank == alone.rows_per_rank
  assert view.in_host_memory.all()
  left = rm.lose(view, (3,))
  plan = rm.recover_checked(both, left, LOST)
  assert cases.frozen(plan) == cases.frozen(shrink.recover(left, LOST))
  nobody = rm.first_feasible(none, none).recover(left, LOST)
  assert nobody.reason.count("none: `none` recovers from nothing") == 2


def test_the_next_in_line_takes_over_when_ranks_run_out():
  policy = rm.first_feasible(
    rm.load("mesh_shrink"), rm.load("restart_cached")
  )
  view = cases.serving(policy, "8x16")
  kinds = []
  for rank in range(7):
    view = rm.lose(view, (rank,))
    plan = rm.recover_checked(policy, view, rm.RanksLost((rank,)))
    assert isinstance(plan, rm.Plan), plan
    restarts = any(isinstance(a, rm.RestartInstance) for a in plan.resume)
    kinds.append("restart" if restarts else "shrink")
    view = rm.advance_all(view, rm.ordered(plan.resume))
    view = rm.advance_all(view, rm.ordered(plan.repair))
    assert rm.servable(view) is None
  # 3 slots a rank hold 16 experts on 6 ranks; 5 need a fresh instance.
  assert kinds[:3] == ["shrink", "shrink", "restart"]
  last = policy.recover(rm.lose(view, (7,)), rm.RanksLost((7,)))
  assert isinstance(last, rm.Infeasible)
  assert "0 of 1 ranks are left" in last.reason


def test_combinators_declare_the_weakest_promise_and_most_spares():
  policies = [rm.load(n) for n in ("mask_experts", "retry", "spare")]
  for policy in (
    rm.first_feasible(*policies),
    rm.cheapest(policies, lambda plan, view: 0.0),
  ):
    assert not policy.lossless
    assert policy.fails_requests
    assert policy.spares == 1
  with pytest.raises(ValueError, match="of 0 policies"):
    rm.first_feasible()


def test_cheapest_takes_the_lowest_price_and_the_first_of_equals():
  policies = [rm.load(n) for n in ("restart", "mesh_shrink", "kv_restore")]
  view = rm.lose(cases.serving(rm.load("kv_restore"), "8x16"), (3,))

  def length(plan, view):
    del view
    return len(plan.resume)

  taken = rm.cheapest(policies, length).recover(view, LOST)
  assert any(isinstance(a, rm.RestartInstance) for a in taken.resume)
  taken = rm.cheapest(policies[1:], lambda p, v: 1.0).recover(view, LOST)
  assert any(isinstance(a, rm.RecomputePrefix) for a in taken.resume)


def test_recover_checked_refuses_a_policy_that_breaks_its_word():
  liar = dataclasses.replace(rm.load("mask_experts"), lossless=True)
  view = rm.lose(cases.serving(liar, "8x16"), (3,))
  with pytest.raises(rm.IllegalPlan, match="MaskExperts: hides experts"):
    rm.recover_checked(liar, view, LOST)
  rude = dataclasses.replace(rm.load("retry"), fails_requests=False)
  with pytest.raises(rm.IllegalPlan, match="FailRequests: ends 2 requests"):
    rm.recover_checked(rude, view, LOST)
