"""What a fault may say, checked when it is made."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from resilient_moe.faults.schedule import Fault

LINK_KINDS = ("link_cut", "link_slow")
KINDS = (
  "rank_lost",
  "rank_leaving",
  "straggler",
  "rank_stuck",
  "store_lost",
  "supervisor_lost",
  *LINK_KINDS,
)
# Only real processes can be stopped, or killed beside the ranks.
PROCESS_KINDS = ("rank_stuck", "store_lost", "supervisor_lost")
RANKLESS_KINDS = ("store_lost", "supervisor_lost")
PHASES = ("any", "decode", "prefill")
INSIDES = ("attention", "exchange", "experts")
INSIDE_KINDS = ("rank_lost", "rank_stuck")
TRIGGERS = ("at_step", "at_s", "at_tokens")
# Kinds, the number that only they carry, what it is above, and if it must be.
_NUMBERS = (
  (("rank_leaving",), "deadline_s", 0.0, True),
  (("straggler",), "slowdown", 1.0, True),
  (("link_slow",), "delay_s", 0.0, True),
  (("rank_stuck", *LINK_KINDS), "resume_s", 0.0, False),
)


def check_fault(fault: "Fault") -> None:
  """Raises ValueError for the first thing that is wrong with a fault."""
  _check_kind(fault)
  _check_list_of_ranks(fault)
  _check_trigger(fault)
  _check_inside(fault)


def _check_kind(fault: "Fault") -> None:
  """The kind is known and carries its own number, and no other kind's."""
  if fault.kind not in KINDS:
    raise ValueError(
      f"unknown kind of fault {fault.kind!r}; choose from {', '.join(KINDS)}"
    )
  for kinds, field, low, needed in _NUMBERS:
    value = getattr(fault, field)
    if fault.kind not in kinds:
      if value is not None:
        raise ValueError(_belongs(fault, field, kinds))
    elif (needed or value is not None) and not _is_number(value, above=low):
      raise ValueError(
        f"fault {fault.kind!r}: {field} is {value!r}; needed is a number above"
        f" {low}"
      )


def _check_list_of_ranks(fault: "Fault") -> None:
  """At least one rank, none negative, none twice; or none at all."""
  ranks = fault.ranks
  if fault.kind in RANKLESS_KINDS:
    if ranks != ():
      raise ValueError(
        f"fault {fault.kind!r}: ranks is {ranks!r}; it strikes no rank, so "
        "needed is ()"
      )
    return
  if not isinstance(ranks, tuple) or not ranks:
    raise ValueError(f"ranks is {ranks!r}; needed is a tuple of rank ids")
  for rank in ranks:
    if not is_count(rank):
      raise ValueError(f"rank {rank!r} is not a rank id (an integer from 0)")
  if len(set(ranks)) < len(ranks):
    raise ValueError(f"ranks {ranks} names a rank twice")
  if fault.kind in LINK_KINDS and len(ranks) != 2:
    raise ValueError(
      f"fault {fault.kind!r}: ranks is {ranks}; needed are the 2 ends of a "
      "link, (attention rank, expert rank)"
    )


def _check_trigger(fault: "Fault") -> None:
  """One moment (or a recovery), in range, and a phase that can come."""
  given = [name for name in TRIGGERS if getattr(fault, name) is not None]
  if len(given) > 1 or not (given or fault.during_recovery is not None):
    raise ValueError(
      f"fault {fault.kind!r} has {len(given)} triggers "
      f"({', '.join(given) or 'none'}); give exactly one of "
      f"{', '.join(TRIGGERS)} (during_recovery may stand alone)"
    )
  for name in ("at_step", "at_tokens", "during_recovery"):
    value = getattr(fault, name)
    if value is not None and not is_count(value):
      raise ValueError(f"{name} is {value!r}; needed is an integer from 0")
  at_s = fault.at_s
  if at_s is not None and not (_is_number(at_s) and at_s >= 0):
    raise ValueError(f"at_s is {at_s!r}; needed is a number from 0")
  if fault.phase not in PHASES:
    raise ValueError(
      f"unknown phase {fault.phase!r}; choose from {', '.join(PHASES)}"
    )
  if fault.during_recovery is not None and fault.phase != "any":
    raise ValueError(
      f"phase {fault.phase!r} with during_recovery={fault.during_recovery}: "
      "no step runs in a recovery; the phase there is 'any'"
    )
  if not isinstance(fault.after_ready, bool):
    raise ValueError(
      f"after_ready is {fault.after_ready!r}; choose from True, False"
    )


def _check_inside(fault: "Fault") -> None:
  """A known part of a step, of a fault that a step can bring."""
  if fault.inside is None:
    return
  if fault.inside not in INSIDES:
    raise ValueError(
      f"fault {fault.kind!r}: inside is {fault.inside!r}; choose from "
      f"{', '.join(INSIDES)}, or None (any moment)"
    )
  if fault.kind not in INSIDE_KINDS:
    raise ValueError(_belongs(fault, "inside", INSIDE_KINDS))
  if fault.during_recovery is not None:
    raise ValueError(
      f"inside {fault.inside!r} with during_recovery={fault.during_recovery}: "
      "no step runs in a recovery; inside there is None"
    )


def _belongs(fault: "Fault", field: str, kinds: tuple[str, ...]) -> str:
  return (
    f"fault {fault.kind!r}: {field}={getattr(fault, field)!r} belongs to "
    f"{', '.join(map(repr, kinds))} only"
  )


def is_count(value: object) -> bool:
  """Whether a value is an integer from 0 (and no truth value)."""
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object, above: float = -math.inf) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
    and value > above
  )
