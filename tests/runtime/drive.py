"""The serve loop by hand, one step at a time, for tests that look between."""

import dataclasses
from typing import Any

from resilient_moe.recovery.checks import request_ranks
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import admit, complete, schedule
from resilient_moe.serving.state import (
  SchedulerState,
  accept,
  with_ranks,
)


@dataclasses.dataclass
class Driver:
  """A backend and the scheduler's state."""

  backend: Any  # an `Instance` that is a whole backend
  state: SchedulerState = dataclasses.field(default_factory=SchedulerState)
  number: int = 0
  retired: tuple[str, ...] = ()
  tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    view = self.backend.view()
    ranks = request_ranks(view)
    self.state = with_ranks(self.state, ranks, view.rows_per_rank)

  def accept(self, requests: tuple[Request, ...]) -> None:
    for request in requests:
      self.state = accept(self.state, request)
      self.tokens[request.request_id] = []

  def step(self, count: int = 1) -> bool:
    """Each domain steps, if it has something to do; whether any had."""
    for _ in range(count):
      self.state, _ = admit(self.state)
      stepped = [self._step(domain) for domain in self.backend.domains()]
      if not any(stepped):
        return False
    return True

  def _step(self, domain: tuple[int, ...]) -> bool:
    view, options = self.backend.view(), self.backend.shape.options
    batch = schedule(
      self.state, number=self.number, epoch=view.epoch, chunk=options.chunk,
      rows=view.rows_per_rank, mesh=domain,
    )  # fmt: skip
    if batch is None:
      return False
    batch = dataclasses.replace(batch, retired=self.retired)
    sampled = self.backend.step(batch)
    self.state, emitted, finished = complete(self.state, batch, sampled)
    self.number += 1
    self.retired = tuple(f.request_id for f in finished)
    for e in emitted:
      self.tokens[e.request_id].append(e.token)
    return True
