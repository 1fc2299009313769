"""A fault as data, and the pure function that says which are due.

A schedule is a tuple of faults. Nothing here remembers: which faults have
struck already is an argument (`injector.Injector` keeps it), so the same
schedule drives the emulated, the process and the simulated runtime.
"""

import dataclasses
import math
from collections.abc import Collection

KINDS = (
  "rank_lost",
  "rank_leaving",
  "straggler",
  "rank_stuck",
  "store_lost",
  "supervisor_lost",
)
# Only real processes can be stopped, or killed beside the ranks.
PROCESS_KINDS = ("rank_stuck", "store_lost", "supervisor_lost")
RANKLESS_KINDS = ("store_lost", "supervisor_lost")
PHASES = ("any", "decode", "prefill")
TRIGGERS = ("at_step", "at_s", "at_tokens")


@dataclasses.dataclass(frozen=True)
class Fault:
  """One thing that breaks, and when.

  `when` is at most one of `at_step`, `at_s`, `at_tokens`; the fault strikes at
  the first moment at or after it that fits `phase`, `during_recovery` and
  `after_ready`. A fault in a recovery may go without (the first recovery).

  Attributes:
    kind: `rank_lost` (the ranks and their memory are gone), `rank_leaving` (a
      warning; they are lost `deadline_s` seconds later, unless drained by
      then), `straggler` (they work on, `slowdown` times slower), `rank_stuck`
      (their processes are stopped; their memory stays), `store_lost` (the
      process with the KV checkpoints is killed) or `supervisor_lost`. The last
      three need real processes (`PROCESS_KINDS`).
    ranks: whom it strikes, all at once; () for the store and the supervisor.
    at_step: steps that the engine has committed.
    at_s: seconds on the run's clock.
    at_tokens: tokens emitted so far, over all requests.
    phase: `prefill` or `decode` strike within a step that does, or does not,
      prefill; `any` does not care.
    deadline_s: how long the warning of `rank_leaving` is.
    slowdown: how much slower a straggler is, more than 1.
    resume_s: seconds after which stuck ranks go on, more than 0; None: never.
    during_recovery: strikes inside a recovery, once this many of its actions
      have been executed. A recovery with fewer actions is left alone.
    after_ready: waits until the meshes that the policy keeps ready are ready
      and, on real processes, repairs are done. What strikes ends that, so of
      several that wait only the first strikes; the others wait again.
  """

  kind: str
  ranks: tuple[int, ...]
  at_step: int | None = None
  at_s: float | None = None
  at_tokens: int | None = None
  phase: str = "any"
  deadline_s: float | None = None
  slowdown: float | None = None
  resume_s: float | None = None
  during_recovery: int | None = None
  after_ready: bool = False

  def __post_init__(self) -> None:
    _check_kind(self)
    _check_list_of_ranks(self)
    _check_trigger(self)


Schedule = tuple[Fault, ...]


@dataclasses.dataclass(frozen=True)
class Moment:
  """What an injector needs to know of the run, each time it is asked."""

  step: int  # steps committed so far
  t_s: float  # seconds on the run's clock, real or virtual
  emitted_tokens: int  # over all requests
  in_prefill: bool = False  # the step at hand prefills for some request
  recovery_actions: int | None = None  # executed so far; None: no recovery
  ready: bool = True  # the ready meshes are ready, repairs are done


def due(
  schedule: Schedule, fired: Collection[int], moment: Moment
) -> tuple[int, ...]:
  """Indices of the faults that strike now, in schedule order."""
  struck = [
    index
    for index, fault in enumerate(schedule)
    if index not in fired and _strikes(fault, moment)
  ]
  waited = [index for index in struck if schedule[index].after_ready]
  return tuple(index for index in struck if index not in waited[1:])


def check_ranks(schedule: Schedule, ranks: int) -> Schedule:
  """The schedule itself, if all its ranks are among `ranks` ranks."""
  for fault in schedule:
    for rank in fault.ranks:
      if rank >= ranks:
        raise ValueError(
          f"fault {fault.kind!r}: rank {rank} is out of range; "
          f"{ranks} ranks have ids 0 to {ranks - 1}"
        )
  return schedule


def _strikes(fault: Fault, moment: Moment) -> bool:
  """Whether a fault that has not struck yet strikes at this moment."""
  if fault.after_ready and not moment.ready:
    return False
  if fault.at_step is not None and moment.step < fault.at_step:
    return False
  if fault.at_s is not None and moment.t_s < fault.at_s:
    return False
  if fault.at_tokens is not None and moment.emitted_tokens < fault.at_tokens:
    return False
  if fault.during_recovery is not None:
    done = moment.recovery_actions
    return done is not None and done >= fault.during_recovery
  if moment.recovery_actions is not None:
    # No step runs in a recovery, so only the clock can bring a fault into it.
    return fault.at_s is not None and fault.phase == "any"
  if fault.phase == "any":
    return True
  return moment.in_prefill == (fault.phase == "prefill")


def _check_kind(fault: Fault) -> None:
  """The kind is known and carries its own number, and no other kind's."""
  if fault.kind not in KINDS:
    raise ValueError(
      f"unknown kind of fault {fault.kind!r}; choose from {', '.join(KINDS)}"
    )
  for kind, field, low, needed in (
    ("rank_leaving", "deadline_s", 0.0, True),
    ("straggler", "slowdown", 1.0, True),
    ("rank_stuck", "resume_s", 0.0, False),
  ):
    value = getattr(fault, field)
    if fault.kind != kind:
      if value is not None:
        raise ValueError(
          f"fault {fault.kind!r}: {field}={value!r} belongs to {kind!r} only"
        )
    elif (needed or value is not None) and not _is_number(value, above=low):
      raise ValueError(
        f"fault {kind!r}: {field} is {value!r}; needed is a number above {low}"
      )


def _check_list_of_ranks(fault: Fault) -> None:
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
    if not _is_count(rank):
      raise ValueError(f"rank {rank!r} is not a rank id (an integer from 0)")
  if len(set(ranks)) < len(ranks):
    raise ValueError(f"ranks {ranks} names a rank twice")


def _check_trigger(fault: Fault) -> None:
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
    if value is not None and not _is_count(value):
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


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object, above: float = -math.inf) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
    and value > above
  )
