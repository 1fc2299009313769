"""Clients in a list: they ask, and ask again where they are failed."""

import dataclasses
from collections.abc import Callable

from resilient_moe.serving.request import Request


class ListIntake:
  """Requests in a list, with what they have been answered so far."""

  def __init__(self, accept: Callable[[Request], None]) -> None:
    """`accept` is told of each request, a client's retries too."""
    self.requests: dict[str, Request] = {}
    self.tokens: dict[str, list[int]] = {}
    self.ended: set[str] = set()
    self.given: set[str] = set()  # to the engine that serves now
    self.failed: list[str] = []  # to be sent again
    self._told = accept

  def accept(self, request: Request) -> None:
    self.requests[request.request_id] = request
    self.tokens[request.request_id] = []
    self._told(request)

  def poll(self, step: int) -> list[tuple[Request, tuple[int, ...]]]:
    while self.failed:
      self._again(self.failed.pop(0))
    now = [r for r in self._waiting() if (r.arrival_step or 0) <= step]
    self.given.update(r.request_id for r in now)
    return [(r, tuple(self.tokens[r.request_id])) for r in now]

  def next_step(self) -> int | None:
    return min((r.arrival_step or 0 for r in self._waiting()), default=None)

  def closed(self) -> bool:
    return self.ended == set(self.requests) and not self.failed

  def _again(self, name: str) -> None:
    """The client's retry of a failed request."""
    root, _, attempt = name.partition("~")
    again = dataclasses.replace(
      self.requests[name], request_id=f"{root}~{int(attempt or 0) + 1}",
      retry_of=name, arrival_step=0,
    )  # fmt: skip
    self.accept(again)

  def _waiting(self) -> list[Request]:
    out = self.given | self.ended
    return [r for n, r in self.requests.items() if n not in out]
