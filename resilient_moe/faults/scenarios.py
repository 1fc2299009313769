"""The scenarios of any deployment.

They do not know which rank does what (`split` has those that do): where not all
do the same, one that takes several ranks may take all of a role.
"""

import random
from collections.abc import Sequence

from resilient_moe.faults import processes
from resilient_moe.faults.schedule import Fault, Schedule
from resilient_moe.faults.setting import Scenario, Setting

GAP_STEPS = 10  # between losses that come one after another
WINDOW_STEPS = 40  # in which a random fault strikes
WARNING_S = 1.0  # of a maintenance
SLOWDOWN = 4.0  # of a straggler
KILLS, MANY_KILLS = 5, 20  # of the scenarios that do not stop


def ring_neighbour(rank: int, ranks: int) -> int:
  """The rank that holds another's KV checkpoint when a peer does."""
  return (rank + 1) % ranks


def none(setting: Setting) -> Schedule:
  """Nothing breaks: the fault-free twin."""
  del setting
  return ()


def rank_lost_decode(setting: Setting) -> Schedule:
  """A rank is lost in a step that only decodes."""
  return (_lost(setting, setting.rank, phase="decode"),)


def rank_lost_prefill(setting: Setting) -> Schedule:
  """A rank is lost in a step that prefills."""
  return (_lost(setting, setting.rank, phase="prefill"),)


def two_at_once(setting: Setting) -> Schedule:
  """Two ranks from opposite sides of the ring are lost at the same moment."""
  return (_lost(setting, setting.rank, setting.after(setting.ranks // 2)),)


def neighbours(setting: Setting) -> Schedule:
  """A rank is lost together with the neighbour that holds its KV checkpoint."""
  other = ring_neighbour(setting.rank, setting.ranks)
  return (_lost(setting, setting.rank, other),)


def one_after_another(setting: Setting) -> Schedule:
  """Half of the ranks are lost, one by one, ten steps apart."""
  return tuple(
    Fault(
      "rank_lost",
      (setting.after(index),),
      at_step=setting.at_step + index * GAP_STEPS,
    )
    for index in range(setting.ranks // 2)
  )


def during_recovery(setting: Setting) -> Schedule:
  """A second rank is lost after one action of the first one's recovery."""
  return (
    _lost(setting, setting.rank),
    Fault("rank_lost", (setting.after(setting.ranks // 2),), during_recovery=1),
  )


def maintenance(setting: Setting) -> Schedule:
  """A rank is announced to go away, and goes at the deadline."""
  return (
    Fault(
      "rank_leaving",
      (setting.rank,),
      at_step=setting.at_step,
      deadline_s=WARNING_S,
    ),
  )


def at_random(setting: Setting) -> Schedule:
  """A rank is lost at a seeded step, in whatever phase that is."""
  later = random.Random(f"scenario/step/{setting.seed}").randrange(WINDOW_STEPS)
  return (Fault("rank_lost", (setting.rank,), at_step=setting.at_step + later),)


def straggler(setting: Setting) -> Schedule:
  """A rank works on, four times slower."""
  return (
    Fault(
      "straggler",
      (setting.rank,),
      at_step=setting.at_step,
      slowdown=SLOWDOWN,
    ),
  )


def killed_again_and_again(setting: Setting) -> Schedule:
  """Ranks are lost one after the other, each once all are back.

  The same rank may be drawn twice: its replacement is lost then.
  """
  return _one_by_one(setting, KILLS)


def killed_twenty_times(setting: Setting) -> Schedule:
  """As `killed_again_and_again`, for as long as a run can be wished to last."""
  return _one_by_one(setting, MANY_KILLS)


def _one_by_one(setting: Setting, kills: int) -> Schedule:
  rng = random.Random(f"scenario/again/{setting.seed}")
  ranks = [setting.rank, *rng.choices(range(setting.ranks), k=kills - 1)]
  return one_when_ready(ranks, setting.at_step, rng)


def one_when_ready(
  ranks: Sequence[int], at_step: int, rng: random.Random
) -> Schedule:
  """One loss after the other, at drawn steps, each once all are back."""
  return tuple(
    Fault(
      "rank_lost",
      (rank,),
      at_step=at_step + index * GAP_STEPS + rng.randint(0, GAP_STEPS),
      after_ready=True,
    )
    for index, rank in enumerate(ranks)
  )


def _lost(setting: Setting, *ranks: int, phase: str = "any") -> Fault:
  return Fault("rank_lost", ranks, at_step=setting.at_step, phase=phase)


SCENARIOS: dict[str, Scenario] = {
  "none": Scenario(none, frozenset({"fault_free"}), 1),
  "rank_lost_decode": Scenario(
    rank_lost_decode, frozenset({"single", "decode"}), 2
  ),
  "rank_lost_prefill": Scenario(
    rank_lost_prefill, frozenset({"single", "prefill"}), 2
  ),
  "two_at_once": Scenario(two_at_once, frozenset({"several"}), 3),
  "neighbours": Scenario(
    neighbours, frozenset({"several", "checkpoint_lost"}), 3
  ),
  "one_after_another": Scenario(
    one_after_another, frozenset({"several", "repeated"}), 2
  ),
  "during_recovery": Scenario(
    during_recovery, frozenset({"several", "in_recovery"}), 3
  ),
  "maintenance": Scenario(maintenance, frozenset({"single", "warning"}), 2),
  "random": Scenario(at_random, frozenset({"single", "random"}), 2),
  "straggler": Scenario(straggler, frozenset({"single", "slow"}), 2),
  # Needs replacements, so a policy that asks for them.
  "killed_again_and_again": Scenario(
    killed_again_and_again,
    frozenset({"several", "repeated", "random", "replaced"}),
    2,
  ),
  "killed_twenty_times": Scenario(
    killed_twenty_times,
    frozenset({"several", "repeated", "random", "replaced"}),
    2,
  ),
  "rank_stuck": Scenario(
    processes.rank_stuck, frozenset({"single", "stuck", "process"}), 2
  ),
  "rank_stuck_returns": Scenario(
    processes.rank_stuck_returns, frozenset({"single", "stuck", "process"}), 2
  ),
  "store_lost": Scenario(
    processes.store_lost, frozenset({"store", "process"}), 1
  ),
  "store_and_rank": Scenario(
    processes.store_and_rank,
    frozenset({"several", "store", "checkpoint_lost", "process"}),
    2,
  ),
  "supervisor_lost": Scenario(
    processes.supervisor_lost, frozenset({"supervisor", "process"}), 1
  ),
}
