"""Expert workers that attention workers have given up by themselves.

An attention worker heals before it tells: to it a worker that answers no probe
is dead. Whether it is so is judged here, with more patience: who stays silent
is fenced, who answers again was only held up, and the attention workers are
told to use it again.
"""

from resilient_moe.runtime.process.crew import Crew
from resilient_moe.runtime.process.wire import Member


class Doubts:
  """Who was given up by whom, and is not judged yet."""

  def __init__(self, crew: Crew) -> None:
    self._crew = crew
    self._by: dict[Member, set[int]] = {}

  def add(self, attention: int, expert: int) -> None:
    """An attention worker got no answer from an expert worker's probes."""
    if self._crew.alive(expert):
      member = self._crew.mate(expert).member
      self._by.setdefault(member, set()).add(attention)

  def judge(self) -> None:
    """Looks at the probes; called every few milliseconds."""
    for member, attending in list(self._by.items()):
      rank, _ = member
      if self._is_there(member):
        self._crew.give_up_silent([rank])
      if not self._is_there(member):
        del self._by[member]
      elif self._crew.watch.answers(rank):
        del self._by[member]
        call = {"rank": rank}
        self._crew.inform(dict.fromkeys(attending, call), "link_up")

  def _is_there(self, member: Member) -> bool:
    rank, _ = member
    return self._crew.alive(rank) and self._crew.mate(rank).member == member
