"""How many extra copies of experts: a number, or as many as memory allows."""

import fractions
import re

from resilient_moe.recovery.view import ClusterView

UNITS = {
  unit: base**power
  for base, ending in ((1000, "B"), (1024, "iB"))
  for power, letter in enumerate("KMGT", start=1)
  for unit in (letter + ending,)
} | {"B": 1}
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|%)")


def check_copies(count: int | str, name: str = "replicas") -> None:
  """Raises ValueError, with the choices, unless `count` can be understood."""
  fine = isinstance(count, int) and count >= 0
  if isinstance(count, str):
    found = MEMORY.fullmatch(count)
    fine = count == "all" or bool(found and found[2] in {*UNITS, "%"})
  if not fine:
    raise ValueError(
      f"{name}={count!r}; choices: 'all' or a number >= 0, or memory for all "
      "of them together: a share of the experts' bytes ('25%') or bytes in "
      f"{', '.join(UNITS)} ('64MB', '1.5GB')"
    )


def copies_of(count: int | str, view: ClusterView) -> int:
  """Extra copies that `count` stands for, at most one an expert.

  A memory budget buys as many whole copies as fit into it.
  """
  if count == "all":
    return view.n_experts
  if isinstance(count, int):
    return min(count, view.n_experts)
  found = MEMORY.fullmatch(count)
  assert found, f"{count!r} was not checked"
  amount = fractions.Fraction(found[1])  # exact: 0.1 of 10 copies is 1
  if found[2] == "%":
    fit = amount / 100 * view.n_experts
  else:
    fit = amount * UNITS[found[2]] / view.expert_bytes
  return min(int(fit), view.n_experts)
