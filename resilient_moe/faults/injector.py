"""The injector: remembers which faults of a schedule have struck."""

import dataclasses
import json
from collections.abc import Iterable

from resilient_moe.faults.check import LINK_KINDS
from resilient_moe.faults.parse import parse_schedule
from resilient_moe.faults.schedule import Fault, Moment, Schedule, due

_FIELDS = ("schedule", "fired", "leaving", "lost")


class Injector:
  """Asked at each moment what strikes; every fault strikes once.

  Its state is three small collections and travels as JSON, so that a restart
  of the engine does not make a fault strike again.
  """

  def __init__(self, schedule: Schedule) -> None:
    self.schedule = schedule
    self._fired: set[int] = set()  # indices into the schedule
    self._leaving: dict[int, float] = {}  # rank -> when it will be gone, t_s
    self._lost: set[int] = set()

  @property
  def finished(self) -> bool:
    """Nothing is left that could strike."""
    return len(self._fired) == len(self.schedule) and not self._leaving

  @property
  def lost(self) -> frozenset[int]:
    """The ranks that are really gone (ground truth)."""
    return frozenset(self._lost)

  def poll(self, moment: Moment) -> list[Fault]:
    """The faults that strike at this moment, each trimmed to live ranks.

    A `rank_leaving` comes back as a `rank_lost` once its deadline has passed.
    """
    struck = self._deadlines(moment.t_s)
    for index in due(self.schedule, self._fired, moment):
      self._fired.add(index)
      fault = self._trim(self.schedule[index])
      if fault is not None:
        self._note(fault, moment.t_s)
        struck.append(fault)
    return struck

  def drained(self, ranks: Iterable[int]) -> None:
    """These ranks left in time: their deadline takes nothing with it."""
    for rank in ranks:
      if self._leaving.pop(rank, None) is not None:
        self._lost.add(rank)

  def add_lost(self, ranks: Iterable[int]) -> None:
    """These ranks are gone for another reason: no fault can strike them."""
    for rank in ranks:
      self._leaving.pop(rank, None)
      self._lost.add(rank)

  def returned(self, ranks: Iterable[int]) -> None:
    """Replacements for these ranks serve, and can be struck again."""
    self._lost.difference_update(ranks)

  def to_json(self) -> str:
    """The whole state, schedule included."""
    return json.dumps(
      {
        "schedule": [_plain(fault) for fault in self.schedule],
        "fired": sorted(self._fired),
        "leaving": sorted(self._leaving.items()),
        "lost": sorted(self._lost),
      }
    )

  @classmethod
  def from_json(cls, text: str, ranks: int) -> "Injector":
    """The injector that wrote `text`, for a run of `ranks` ranks."""
    state = json.loads(text)
    if not isinstance(state, dict) or set(state) != set(_FIELDS):
      raise ValueError(
        f"the state of an injector is {text[:80]!r}; needed is a JSON object "
        f"with {', '.join(_FIELDS)}"
      )
    injector = cls(parse_schedule(state["schedule"], ranks))
    injector._fired = set(state["fired"])
    injector._leaving = dict(state["leaving"])
    injector._lost = set(state["lost"])
    return injector

  def _deadlines(self, t_s: float) -> list[Fault]:
    """One loss per deadline that has passed, earliest first."""
    passed = sorted({t for t in self._leaving.values() if t <= t_s})
    losses = []
    for deadline in passed:
      ranks = sorted(r for r, t in self._leaving.items() if t == deadline)
      losses.append(Fault("rank_lost", tuple(ranks), at_s=deadline))
      self._note(losses[-1], t_s)
    return losses

  def _trim(self, fault: Fault) -> Fault | None:
    """The fault without the ranks that are gone already; None: nobody left."""
    ranks = tuple(rank for rank in fault.ranks if rank not in self._lost)
    if ranks == fault.ranks:
      return fault
    if fault.kind in LINK_KINDS:
      return None  # one end is gone, and the link with it
    return dataclasses.replace(fault, ranks=ranks) if ranks else None

  def _note(self, fault: Fault, t_s: float) -> None:
    """Keeps what a fault does to its ranks."""
    stopped = fault.kind == "rank_stuck" and fault.resume_s is None
    if fault.kind == "rank_lost" or stopped:
      self.add_lost(fault.ranks)
    elif fault.kind == "rank_leaving":
      assert fault.deadline_s is not None  # checked by Fault
      for rank in fault.ranks:
        self._leaving.setdefault(rank, t_s + fault.deadline_s)


def _plain(fault: Fault) -> dict[str, object]:
  """The fields that are not at their default."""
  fields = dataclasses.fields(fault)
  return {
    field.name: getattr(fault, field.name)
    for field in fields
    if getattr(fault, field.name) != field.default
  }
