"""Which faults fit which ranks, where not all ranks do the same.

Disaggregated: ranks 0 to attention - 1 do attention and hold the requests and
their KV; the others hold the experts. Collocated: all do both.
"""

from resilient_moe.faults.check import KINDS, LINK_KINDS, is_count
from resilient_moe.faults.schedule import Fault, Schedule, check_ranks


def check_attention(attention: int, ranks: int) -> None:
  """Raises ValueError unless some ranks are left for each role."""
  # Zero of any number: collocated, and how few ranks do is asked elsewhere.
  if attention != 0 and not (is_count(attention) and attention < ranks):
    raise ValueError(
      f"attention is {attention!r}; of {ranks} ranks at least one attends and "
      f"one computes experts: choose from 1 to {ranks - 1}, or 0 (collocated)"
    )


def check_roles(schedule: Schedule, attention: int, ranks: int) -> Schedule:
  """The schedule itself, if every fault fits the roles of its ranks.

  Args:
    schedule: the faults.
    attention: ranks 0 to attention - 1 do attention and the others experts;
      0: collocated, all ranks do both.
    ranks: how many there are; others are refused, as by `check_ranks`.

  Returns:
    The schedule.

  Raises:
    ValueError: for a link that isn't between an attention and an expert rank,
      a rank that can't be struck `inside` what it doesn't do, and either in a
      collocated deployment.
  """
  check_attention(attention, ranks)
  for fault in check_ranks(schedule, ranks):
    if attention == 0:
      _check_collocated(fault)
    elif fault.kind in LINK_KINDS:
      _check_link(fault, attention, ranks)
    else:
      _check_place(fault, attention, ranks)
  return schedule


def _check_collocated(fault: Fault) -> None:
  """Nothing that only a disaggregated deployment has."""
  needs = "needs a disaggregated deployment, not a collocated one (attention=0)"
  if fault.kind in LINK_KINDS:
    others = ", ".join(kind for kind in KINDS if kind not in LINK_KINDS)
    raise ValueError(
      f"fault {fault.kind!r} of ranks {fault.ranks} {needs}; there choose from"
      f" {others}"
    )
  if fault.inside is not None:
    raise ValueError(
      f"fault {fault.kind!r}: inside={fault.inside!r} {needs}; there inside is "
      "None"
    )


def _check_link(fault: Fault, attention: int, ranks: int) -> None:
  aw, ew = fault.ranks
  if not aw < attention <= ew:
    raise ValueError(
      f"fault {fault.kind!r}: ranks is {fault.ranks}; needed is (attention "
      f"rank, expert rank): the first from 0 to {attention - 1}, the second "
      f"from {attention} to {ranks - 1}"
    )


def _check_place(fault: Fault, attention: int, ranks: int) -> None:
  """No rank is struck inside what the other role does."""
  first, end = {
    "attention": (0, attention),
    "experts": (attention, ranks),
  }.get(fault.inside or "", (0, ranks))
  for rank in fault.ranks:
    if not first <= rank < end:
      raise ValueError(
        f"fault {fault.kind!r}: inside={fault.inside!r} can't strike rank "
        f"{rank}; choose from ranks {first} to {end - 1}"
      )
