"""A fault as data, and the pure function that says which are due.

A schedule is a tuple of faults. Nothing here remembers: which faults have
struck already is an argument (`injector.Injector` keeps it), so the same
schedule drives the emulated, the process and the simulated runtime.
"""

import dataclasses
from collections.abc import Collection

from resilient_moe.faults.check import check_fault


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
      process with the KV checkpoints is killed), `supervisor_lost`, `link_cut`
      (nothing passes any more between two ranks that live) or `link_slow` (it
      arrives `delay_s` seconds later). `PROCESS_KINDS` need real processes,
      `LINK_KINDS` a disaggregated deployment.
    ranks: whom it strikes, all at once; (attention rank, expert rank) of a
      link; () for the store and the supervisor.
    at_step: steps that the engine has committed.
    at_s: seconds on the run's clock.
    at_tokens: tokens emitted so far, over all requests.
    phase: `prefill` or `decode` strike within a step that does, or does not,
      prefill; `any` does not care.
    deadline_s: how long the warning of `rank_leaving` is.
    slowdown: how much slower a straggler is, more than 1.
    resume_s: seconds after which stuck ranks go on, or a link works as before,
      more than 0; None: never.
    during_recovery: strikes inside a recovery, once this many of its actions
      have been executed. A recovery with fewer actions is left alone.
    after_ready: waits until the meshes that the policy keeps ready are ready
      and, on real processes, repairs are done. What strikes ends that, so of
      several that wait only the first strikes; the others wait again.
    delay_s: how much later arrives what passes a slow link, more than 0.
    inside: the part of a step in which a lost or stuck rank is struck, if the
      deployment is disaggregated: its `attention`, its `experts` compute, or
      the `exchange`, where an attention rank waits for answers and an expert
      rank has a parcel and has not computed. None: any moment.
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
  delay_s: float | None = None
  inside: str | None = None

  def __post_init__(self) -> None:
    check_fault(self)


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
    anywhere = fault.phase == "any" and fault.inside is None
    return fault.at_s is not None and anywhere
  if fault.phase == "any":
    return True
  return moment.in_prefill == (fault.phase == "prefill")
