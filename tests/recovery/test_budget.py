"""Extra copies planned from a memory budget: how many, of which, and where."""

import re

import numpy as np
import pytest

from resilient_moe import recovery as rm
from tests.policies.ask import recovered
from tests.recovery import cases

MB = 10**6
LOAD = tuple(float((7 * e) % 16) for e in range(16))  # 9 has the most


def bare(**kwargs):
  """16 experts of 1 MB on 8 expert ranks, beside 4 attention ranks."""
  return rm.bare_view(12, 16, attention=4, expert_bytes=MB, **kwargs)


def extras(view, standing):
  """Which experts have an extra copy, one name for each copy."""
  held = np.bincount(standing.slots[standing.slots >= 0], minlength=16)
  assert (held >= 1).all()
  return np.repeat(np.arange(16), held - 1).tolist()


@pytest.mark.parametrize(
  ("budget", "copies"),
  [
    ("0B", 0), ("999999B", 0), ("1MB", 1), ("1000KB", 1), ("1.5MB", 1),
    ("4 MB", 4), ("5MiB", 5), ("0.007GB", 7), ("25%", 4), ("24.9%", 3),
    ("0%", 0), ("100%", 16), ("16MB", 16), ("1.5GB", 16), ("300%", 16),
    (3, 3), (99, 16), ("all", 16),
  ],
)  # fmt: skip
@pytest.mark.parametrize("apart", [False, True])
def test_as_many_copies_as_fit_and_no_more(budget, copies, apart):
  view = bare() if apart else rm.bare_view(8, 16, expert_bytes=MB)
  name = "tarragon" if apart else "replica_promotion"
  word = "shadows" if apart else "replicas"
  standing = rm.load(name, **{word: budget}).prepare(view)
  found = extras(view, standing)
  assert len(found) == copies
  if str(budget).endswith("%"):
    assert len(found) <= float(budget[:-1]) / 100 * 16
  elif str(budget).endswith(" MB"):
    assert len(found) * view.expert_bytes <= float(budget[:-2]) * MB


def test_mb_is_a_million_and_mib_a_power_of_two():
  view = rm.bare_view(8, 16, expert_bytes=1 << 20)
  for budget, copies in (("1MB", 0), ("1MiB", 1), ("9MB", 8), ("0.01GiB", 10)):
    standing = rm.load("replica_promotion", replicas=budget).prepare(view)
    assert len(extras(view, standing)) == copies


@pytest.mark.parametrize("seed", range(30))
def test_a_random_budget_is_never_exceeded(seed):
  rng = np.random.default_rng(seed)
  size, budget = int(rng.integers(1, 1 << 22)), int(rng.integers(1 << 26))
  n, experts = int(rng.integers(2, 9)), int(rng.integers(2, 40))
  view = rm.bare_view(n + 2, experts, attention=2, expert_bytes=size)
  standing = rm.load("tarragon", shadows=f"{budget}B").prepare(view)
  copies = int((standing.slots >= 0).sum()) - experts
  assert copies * size <= budget
  assert copies == min(budget // size, experts)


@pytest.mark.parametrize("bad", [
  "", "64", "MB", "64mb", "-1MB", "64 XB", "1e3MB", "half", "5 %%", -1, 2.5,
  None, "64PB",
])  # fmt: skip
def test_what_is_no_budget_is_an_error_with_the_choices(bad):
  message = re.escape(f"replicas={bad!r}; choices: 'all' or a number >= 0, or")
  with pytest.raises(ValueError, match=message + r".*'25%'.*'64MB'"):
    rm.axes.replicas(bad)


def test_the_most_loaded_get_one_first():
  busiest = np.argsort(-np.array(LOAD), kind="stable")
  for budget, n in (("3MB", 3), ("50%", 8), (5, 5)):
    policy = rm.load("tarragon", shadows=budget, load=LOAD)
    found = extras(bare(), policy.prepare(bare()))
    assert sorted(found) == sorted(busiest[:n].tolist())
  with pytest.raises(ValueError, match=r"load of shape \(3,\) for 16 experts"):
    rm.load("tarragon", load=[1.0, 2.0, 3.0]).prepare(bare())


@pytest.mark.parametrize("budget", ["10%", "40%", "7MB", "100%"])
@pytest.mark.parametrize(
  "where", [{"ranks_per_host": 2}, {"ranks_per_host": 1, "hosts_per_rack": 3}]
)
def test_shadows_lie_in_another_failure_domain(budget, where):
  view = bare(**where)
  policy = rm.load("tarragon", shadows=budget, load=LOAD)
  standing = policy.prepare(view)
  domain = view.rack if "hosts_per_rack" in where else view.host
  some = extras(view, standing)
  assert some
  for expert in some:
    ranks = np.flatnonzero((standing.slots == expert).any(axis=1))
    assert len(set(domain[ranks].tolist())) == 2, f"expert {expert}"
    assert (view.role[ranks] == rm.Role.EXPERT).all()
  # They serve nothing: one entry each, balanced over the ranks.
  assert (standing.table.copies() == 1).all()
  served = np.bincount(standing.table.entries[:, 0, 0], minlength=12)
  assert served[4:].tolist() == [2] * 8


def test_the_budget_holds_after_a_recovery_too():
  lost = rm.RanksLost((3,))
  view, plan = recovered("tarragon", lost, "3+5x16", shadows="50%")
  steps = rm.ordered(plan.resume) + rm.ordered(plan.repair)
  repaired = rm.advance_all(view, steps)
  twice = [e for e in range(16) if len(cases.held(repaired, e)) > 1]
  assert set(range(8)) <= set(twice), "those that were to have a shadow"
