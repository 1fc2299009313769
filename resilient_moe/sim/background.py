"""What gets ready behind traffic: meshes, one by one, and processes."""

import collections
from collections.abc import Callable, Iterable
from typing import NamedTuple

from resilient_moe.recovery import mesh_named
from resilient_moe.sim.clock import VirtualClock

Name = frozenset[int]


class _Wanted(NamedTuple):
  name: Name
  mesh: tuple[int, ...]


class Background:
  """Meshes that are to be made ready, and replacements that start.

  A mesh that is made is only told of by `take`, between two steps, so that no
  plan is carried out in another world than it was made for.
  """

  def __init__(
    self, clock: VirtualClock, ready_s: Callable[[int], float], by_step: bool
  ) -> None:
    """`ready_s`: seconds for a mesh of so many ranks; `by_step`: none."""
    self._clock, self._ready_s, self._by_step = clock, ready_s, by_step
    self._todo: collections.deque[_Wanted] = collections.deque()
    self._made: collections.deque[tuple[Name, float]] = collections.deque()
    self._at_work: _Wanted | None = None
    self._starting: dict[int, float] = {}  # rank -> when it is up

  # -- meshes

  def want(self, launched: tuple[int, ...], names: Iterable[Name]) -> None:
    """Adds meshes to make ready."""
    for name in names:
      mesh = tuple(mesh_named(launched, name).tolist())
      self._todo.append(_Wanted(name, mesh))
    self._work()

  def wants(self, name: Name) -> bool:
    """Whether a mesh is on its way to be ready, or waits to be told of."""
    on_its_way = any(w.name == name for w in self._todo)
    return on_its_way or any(n == name for n, _ in self._made)

  @property
  def done(self) -> bool:
    return not self._todo and not self._made

  def _work(self) -> None:
    """Begins with the first mesh, unless one is being made."""
    if self._by_step or self._at_work is not None or not self._todo:
      return
    wanted = self._at_work = self._todo[0]
    seconds = self._ready_s(len(wanted.mesh))
    self._clock.at(
      self._clock.now() + seconds, lambda: self._finish(wanted, seconds)
    )

  def _finish(self, wanted: _Wanted, seconds: float) -> None:
    self._at_work = None
    if wanted in self._todo:  # else one of its ranks was lost meanwhile
      self._todo.remove(wanted)
      self._made.append((wanted.name, seconds))
    self._work()

  def take(self) -> tuple[Name, float] | None:
    """A mesh that is ready now, with the seconds that it took."""
    if self._by_step and self._todo:
      return self._todo.popleft().name, 0.0
    return self._made.popleft() if self._made else None

  def drop_rank(self, rank: int) -> None:
    """Meshes with a lost rank will never be needed."""
    kept = [w for w in self._todo if rank not in w.mesh]
    self._todo = collections.deque(kept)

  # -- processes

  def launch(self, rank: int, seconds: float) -> None:
    """A replacement starts."""
    self._starting[rank] = self._clock.now() + seconds
    self._clock.at(self._starting[rank], lambda: None)  # something to wait for

  def up(self, rank: int) -> bool:
    """Whether a rank's process can be used (or never was replaced)."""
    return self._starting.get(rank, 0.0) <= self._clock.now()
