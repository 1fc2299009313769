"""Who is stuck, who is slow: probes, clocks and rules put together."""

import pathlib
from collections.abc import Iterable, Mapping

from resilient_moe.runtime.process.probe import Prober
from resilient_moe.runtime.process.rules import (
  Limits,
  StepClock,
  Stragglers,
  stuck,
  suspected,
)
from resilient_moe.runtime.process.wire import Up


class Watch:
  """The evidence against each worker of an engine."""

  def __init__(self, limits: Limits, folder: pathlib.Path) -> None:
    self.limits = limits
    self.clock = StepClock(limits)
    self.slow = Stragglers(limits)
    self._prober = Prober(limits.probe_interval_s, folder)
    self._watched: set[int] = set()

  def add(self, rank: int, up: Up) -> None:
    """Begins to probe a worker that is up."""
    self._prober.add(rank, up.data[0], up.probe_port)
    self._watched.add(rank)

  def remove(self, rank: int) -> None:
    if rank in self._watched:
      self._watched.discard(rank)
      self._prober.remove(rank)
      self.slow.forget(rank)

  def stuck(self, ranks: Iterable[int], running_s: float) -> tuple[int, ...]:
    """Ranks that hold up a call which has run for so long."""
    ranks = [r for r in ranks if r in self._watched]
    missed = {r: self._prober.missed(r) for r in ranks}
    late = suspected(missed, self.limits)
    silence = {r: self._prober.silence_s(r) for r in late}
    return stuck(silence, running_s, self.clock, self.limits)

  def answers(self, rank: int) -> bool:
    """Whether a worker has answered the last probe that it should have."""
    return rank in self._watched and not self._prober.missed(rank)

  def stepped(self, seconds: float, local_s: Mapping[int, float]) -> None:
    """A step counts: how long it took, and each rank's own part of it."""
    self.clock.finished(seconds)
    self.slow.add(local_s)

  def close(self) -> None:
    self._prober.close()
