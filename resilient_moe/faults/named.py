"""Named scenarios: the same faults for tests, benchmarks and tables.

`at_step` says when the first fault strikes and `rank` whom; without a rank the
seed draws one, so that a table over several seeds covers several ranks.
"""

import dataclasses
import random

from resilient_moe.faults.roles import check_attention
from resilient_moe.faults.scenarios import SCENARIOS
from resilient_moe.faults.schedule import Schedule
from resilient_moe.faults.setting import Setting, SplitScenario, SplitSetting
from resilient_moe.faults.split import SPLIT_SCENARIOS


def scenario_names(attention: int = 0) -> tuple[str, ...]:
  """The scenarios of a deployment; `attention` as in `scenario`."""
  return (*SCENARIOS, *(SPLIT_SCENARIOS if attention else ()))


def scenario(
  name: str,
  ranks: int,
  seed: int = 0,
  *,
  at_step: int = 20,
  rank: int | None = None,
  after_ready: bool = False,
  attention: int = 0,
) -> Schedule:
  """The schedule of a named scenario.

  Args:
    name: one of `SCENARIOS`, or, disaggregated, of `SPLIT_SCENARIOS`.
    ranks: how many ranks serve.
    seed: draws what is not given.
    at_step: when the first fault may strike.
    rank: whom it strikes first (of a link, either end); drawn when not given.
    after_ready: each fault waits for readiness, as in `Fault`.
    attention: ranks 0 to attention - 1 do attention and the others experts;
      0: collocated, all ranks do both.

  Returns:
    The schedule.
  """
  check_attention(attention, ranks)
  _check_name(name, attention)
  if name in SPLIT_SCENARIOS:
    schedule = _split(name, ranks, attention, seed, at_step, rank)
  else:
    schedule = _whole(name, ranks, seed, at_step, rank)
  if after_ready:
    # Inside a recovery the next meshes are not ready yet: no wait for those.
    schedule = tuple(
      dataclasses.replace(fault, after_ready=fault.during_recovery is None)
      for fault in schedule
    )
  return schedule


def _check_name(name: str, attention: int) -> None:
  """The deployment has such a scenario."""
  names = scenario_names(attention)
  if name in names:
    return
  wrong = f"unknown scenario {name!r}"
  if name in SPLIT_SCENARIOS:
    wrong = (
      f"scenario {name!r} needs a disaggregated deployment, not a collocated "
      "one (attention=0)"
    )
  raise ValueError(f"{wrong}; choose from {', '.join(names)}")


def _whole(
  name: str, ranks: int, seed: int, at_step: int, rank: int | None
) -> Schedule:
  """A scenario to which all ranks are the same."""
  chosen = SCENARIOS[name]
  if ranks < chosen.min_ranks:
    raise ValueError(
      f"scenario {name!r} needs at least {chosen.min_ranks} ranks, not {ranks}"
    )
  if rank is None:
    rank = random.Random(f"scenario/{seed}").randrange(ranks)
  _check_rank(rank, ranks)
  return chosen.make(Setting(ranks, seed, at_step, rank))


def _split(
  name: str,
  ranks: int,
  attention: int,
  seed: int,
  at_step: int,
  rank: int | None,
) -> Schedule:
  """A scenario that knows who does what."""
  chosen = SPLIT_SCENARIOS[name]
  for role, low, there in (
    ("attention", chosen.min_attention, attention),
    ("expert", chosen.min_experts, ranks - attention),
  ):
    if there < low:
      raise ValueError(
        f"scenario {name!r} needs at least {low} {role} ranks, not {there}"
      )
  # Both are drawn for all, so that scenarios of one seed strike the same.
  rng = random.Random(f"scenario/split/{seed}")
  aw, ew = rng.randrange(attention), rng.randrange(attention, ranks)
  if rank is not None:
    _check_rank(rank, ranks)
    _check_first(name, chosen, rank, attention, ranks)
    aw, ew = (rank, ew) if rank < attention else (aw, rank)
  return chosen.make(
    SplitSetting(ranks, attention, seed, at_step, aw, ew, rank)
  )


def _check_rank(rank: int, ranks: int) -> None:
  if not 0 <= rank < ranks:
    raise ValueError(
      f"rank {rank} is out of range; {ranks} ranks have ids 0 to {ranks - 1}"
    )


def _check_first(
  name: str, chosen: SplitScenario, rank: int, attention: int, ranks: int
) -> None:
  """The first to be struck does what the scenario strikes first."""
  if chosen.first == "any":
    return
  aws = chosen.first == "attention"
  first, end = (0, attention) if aws else (attention, ranks)
  if not first <= rank < end:
    raise ValueError(
      f"rank {rank} can't be the first that scenario {name!r} strikes; its "
      f"role is {chosen.first!r}: choose from ranks {first} to {end - 1}"
    )
