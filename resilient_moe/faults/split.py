"""The scenarios of a disaggregated deployment: they know who does what.

AW: an attention rank, with requests, their KV and the attention weights. EW: an
expert rank.
"""

import random
from collections.abc import Callable

from resilient_moe.faults.processes import STORE_GAP_STEPS
from resilient_moe.faults.scenarios import (
  GAP_STEPS,
  MANY_KILLS,
  one_when_ready,
)
from resilient_moe.faults.schedule import Fault, Schedule
from resilient_moe.faults.setting import SplitScenario, SplitSetting

LINK_DELAY_S = 0.02  # of each parcel: slow, and far from looking stuck


def ew_lost(setting: SplitSetting) -> Schedule:
  """An expert rank is lost, whatever it is doing."""
  return (_lost(setting, setting.ew),)


def aw_lost(setting: SplitSetting) -> Schedule:
  """An attention rank is lost, whatever it is doing."""
  return (_lost(setting, setting.aw),)


def ew_in_experts(setting: SplitSetting) -> Schedule:
  """An expert rank is lost while it computes."""
  return (_lost(setting, setting.ew, inside="experts"),)


def ew_in_exchange(setting: SplitSetting) -> Schedule:
  """An expert rank is lost with a parcel that it has not computed."""
  return (_lost(setting, setting.ew, inside="exchange"),)


def aw_in_attention(setting: SplitSetting) -> Schedule:
  """An attention rank is lost in its attention."""
  return (_lost(setting, setting.aw, inside="attention"),)


def aw_in_exchange(setting: SplitSetting) -> Schedule:
  """An attention rank is lost while it waits for the experts' answers."""
  return (_lost(setting, setting.aw, inside="exchange"),)


def aw_in_prefill(setting: SplitSetting) -> Schedule:
  """An attention rank is lost in a step that prefills."""
  return (_lost(setting, setting.aw, phase="prefill"),)


def two_ews(setting: SplitSetting) -> Schedule:
  """Two expert ranks from opposite sides of their ring are lost at once."""
  # Who holds an expert's copies is the policy's choice, and not known here.
  return (_lost(setting, setting.ew, setting.ew_after(setting.experts // 2)),)


def two_aws_apart(setting: SplitSetting) -> Schedule:
  """Two attention ranks are lost, the second after the first's recovery."""
  second = Fault(
    "rank_lost",
    (setting.aw_after(setting.attention // 2),),
    # No step is committed in a recovery, and no step can bring a fault there.
    at_step=setting.at_step + GAP_STEPS,
  )
  return (_lost(setting, setting.aw), second)


def ew_and_aw(setting: SplitSetting) -> Schedule:
  """An expert rank and an attention rank are lost at the same moment."""
  return (_lost(setting, setting.ew, setting.aw),)


def ew_then_aw_during_recovery(setting: SplitSetting) -> Schedule:
  """An attention rank is lost after one action of an expert rank's recovery."""
  return (
    _lost(setting, setting.ew),
    Fault("rank_lost", (setting.aw,), during_recovery=1),
  )


def link_cut(setting: SplitSetting) -> Schedule:
  """Nothing passes any more between two ranks that live."""
  return (
    Fault("link_cut", (setting.aw, setting.ew), at_step=setting.at_step),
  )


def link_slow(setting: SplitSetting) -> Schedule:
  """What passes between two ranks arrives later, from then on."""
  return (
    Fault(
      "link_slow",
      (setting.aw, setting.ew),
      at_step=setting.at_step,
      delay_s=LINK_DELAY_S,
    ),
  )


def store_and_aw(setting: SplitSetting) -> Schedule:
  """The store is killed, a few steps later an attention rank that used it."""
  later = setting.at_step + STORE_GAP_STEPS
  return (
    Fault("store_lost", (), at_step=setting.at_step),
    Fault("rank_lost", (setting.aw,), at_step=later),
  )


def killed_twenty_times_apart(setting: SplitSetting) -> Schedule:
  """Ranks of either role are lost one after the other, each once all are back.

  Whoever is the only one of a role is left alone.
  """
  aws, ews = range(setting.attention), range(setting.attention, setting.ranks)
  roles = [role for role in (aws, ews) if len(role) > 1]
  if not roles:
    raise ValueError(
      "scenario 'killed_twenty_times_apart' needs at least 2 ranks of a role, "
      "not 1 attention and 1 expert rank"
    )
  first = setting.rank
  if first is not None and not any(first in role for role in roles):
    raise ValueError(
      f"rank {first} is the only one of its role, which scenario "
      "'killed_twenty_times_apart' leaves alone; choose from ranks "
      f"{roles[0][0]} to {roles[0][-1]}"
    )
  rng = random.Random(f"scenario/apart/{setting.seed}")
  ranks = [rng.choice(rng.choice(roles)) for _ in range(MANY_KILLS)]
  if first is not None:
    ranks[0] = first
  return one_when_ready(ranks, setting.at_step, rng)


def _lost(
  setting: SplitSetting,
  *ranks: int,
  phase: str = "any",
  inside: str | None = None,
) -> Fault:
  return Fault(
    "rank_lost", ranks, at_step=setting.at_step, phase=phase, inside=inside
  )


def _row(
  make: Callable[[SplitSetting], Schedule],
  first: str,
  tags: str,
  *,
  aws: int = 1,
  ews: int = 1,
) -> SplitScenario:
  return SplitScenario(make, frozenset(tags.split()), first, aws, ews)


SPLIT_SCENARIOS: dict[str, SplitScenario] = {
  made.make.__name__: made
  for made in (
    _row(ew_lost, "experts", "single", ews=2),
    _row(aw_lost, "attention", "single", aws=2),
    _row(ew_in_experts, "experts", "single inside", ews=2),
    _row(ew_in_exchange, "experts", "single inside", ews=2),
    _row(aw_in_attention, "attention", "single inside", aws=2),
    _row(aw_in_exchange, "attention", "single inside", aws=2),
    _row(aw_in_prefill, "attention", "single prefill", aws=2),
    _row(two_ews, "experts", "several", ews=3),
    _row(two_aws_apart, "attention", "several repeated", aws=3),
    _row(ew_and_aw, "experts", "several", aws=2, ews=2),
    _row(
      ew_then_aw_during_recovery, "experts", "several in_recovery", aws=2, ews=2
    ),
    # Who can't be reached by somebody may have to go.
    _row(link_cut, "any", "link", ews=2),
    _row(link_slow, "any", "link slow"),
    _row(
      store_and_aw, "attention", "several store checkpoint_lost process", aws=2
    ),
    # Needs replacements, so a policy that asks for them.
    _row(
      killed_twenty_times_apart, "any", "several repeated random replaced"
    ),
  )
}
