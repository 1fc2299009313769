"""The example that teaches a new policy is run as it stands."""

import pathlib
import re

from resilient_moe import recovery as rm
from tests.recovery import cases

README = pathlib.Path(rm.__file__).parents[2] / "policies" / "README.md"


def example() -> rm.RecoveryPolicy:
  """The policy of the README's only Python block."""
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  names: dict = {}
  exec(compile(code, str(README), "exec"), names)
  return names["make"]()


def test_the_example_recovers():
  policy = example()
  view = cases.serving(policy, "8x16")
  lost = rm.RanksLost((3,))
  view = cases.after(view, lost)
  plan = rm.recover_checked(policy, view, lost)
  after = rm.advance_all(view, rm.ordered(plan.resume))
  assert rm.servable(after) is None
  assert sorted(plan.paused) == ["r0003", "r0011"]
  assert (after.requests.rank == -1).sum() == 2


def test_the_example_plans_from_the_middle_of_a_recovery():
  policy = example()
  first, second = rm.RanksLost((3,)), rm.RanksLost((5,))
  start = cases.after(cases.serving(policy, "8x16"), first)
  steps = rm.ordered(policy.recover(start, first).resume)
  for stop in range(len(steps) + 1):
    view = cases.after(rm.advance_all(start, steps[:stop]), second)
    assert isinstance(rm.recover_checked(policy, view, second), rm.Plan)


def test_the_example_is_short():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  assert len([line for line in code.splitlines() if line.strip()]) <= 40
  assert max(map(len, code.splitlines())) <= 80


def test_the_axes_that_the_readme_lists_exist():
  table = README.read_text().split("| ranks: who serves |")[1]
  for name in re.findall(r"`(\w+)\(", table.split("`axes.compose")[0]):
    assert name in rm.axes.__all__
