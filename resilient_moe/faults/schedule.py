"""A fault as data, and the pure function that says which are due.

A schedule is a tuple of faults. Nothing here remembers: which faults have
struck already is an argument (`injector.Injector` keeps it), so the same
schedule drives the emulated, the process and the simulated runtime.
"""

import dataclasses
import math
import random
from collections.abc import Collection

KINDS = ("rank_lost", "rank_leaving", "straggler")
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
      then) or `straggler` (they work on, `slowdown` times slower).
    ranks: whom it strikes, all at once.
    at_step: steps that the engine has committed.
    at_s: seconds on the run's clock.
    at_tokens: tokens emitted so far, over all requests.
    phase: `prefill` or `decode` strike within a step that does, or does not,
      prefill; `any` does not care.
    deadline_s: how long the warning of `rank_leaving` is.
    slowdown: how much slower a straggler is, more than 1.
    during_recovery: strikes inside a recovery, once this many of its actions
      have been executed. A recovery with fewer actions is left alone.
    after_ready: waits until the meshes that the policy keeps ready are ready.
  """

  kind: str
  ranks: tuple[int, ...]
  at_step: int | None = None
  at_s: float | None = None
  at_tokens: int | None = None
  phase: str = "any"
  deadline_s: float | None = None
  slowdown: float | None = None
  during_recovery: int | None = None
  after_ready: bool = False

  def __post_init__(self) -> None:
    _check_kind(self)
    _check_list_of_ranks(self.ranks)
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
  ready: bool = True  # the ready meshes are ready


def due(
  schedule: Schedule, fired: Collection[int], moment: Moment
) -> tuple[int, ...]:
  """Indices of the faults that strike now, in schedule order."""
  return tuple(
    index
    for index, fault in enumerate(schedule)
    if index not in fired and _strikes(fault, moment)
  )


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
  for kind, field, low in (
    ("rank_leaving", "deadline_s", 0.0),
    ("straggler", "slowdown", 1.0),
  ):
    value = getattr(fault, field)
    if fault.kind != kind:
      if value is not None:
        raise ValueError(
          f"fault {fault.kind!r}: {field}={value!r} belongs to {kind!r} only"
        )
    elif not _is_number(value) or value <= low:
      raise ValueError(
        f"fault {kind!r}: {field} is {value!r}; needed is a number above {low}"
      )


def _check_list_of_ranks(ranks: tuple[int, ...]) -> None:
  """At least one rank, none negative, none twice."""
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


def _is_number(value: object) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )
