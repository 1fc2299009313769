"""Schedules that a seed draws."""

import random

from resilient_moe.faults.schedule import Fault, Schedule


def random_schedule(
  seed: int,
  ranks: int,
  steps: tuple[int, int],
  count: int = 1,
  *,
  phases: tuple[str, ...] = ("any",),
  after_ready: bool = False,
) -> Schedule:
  """`count` losses of different ranks, at seeded steps, sorted by step.

  Args:
    seed: equal seeds give equal schedules, on any machine.
    ranks: how many there are; at least one is never struck.
    steps: first and last step at which a fault may strike.
    count: how many ranks are lost, one fault each.
    phases: the phase of each fault is drawn from these.
    after_ready: as in `Fault`.

  Returns:
    The schedule.
  """
  if not 0 <= count < ranks:
    raise ValueError(
      f"count is {count}; of {ranks} ranks 0 to {ranks - 1} can be lost"
    )
  first, last = steps
  if not 0 <= first <= last:
    raise ValueError(f"steps is {steps}; needed is 0 <= first <= last")
  # A string is hashed to a seed the same way by every Python.
  rng = random.Random(f"faults/{seed}")
  struck = rng.sample(range(ranks), count)
  when = sorted(rng.randint(first, last) for _ in range(count))
  return tuple(
    Fault(
      "rank_lost",
      (rank,),
      at_step=step,
      phase=rng.choice(phases),
      after_ready=after_ready,
    )
    for rank, step in zip(struck, when, strict=True)
  )
