"""Histories of two attention ranks that step by themselves, made by hand."""

from typing import Any

from resilient_moe.report.history import Event
from tests.report import synthetic as s

U = s.STEP_S
APART = {"deployment": "disaggregated", "ranks": 6}


def steps(b: s.Builder, rank: int, *requests: Any, seconds: float = U) -> None:
  """A step of one rank that ends now; it began so many seconds ago."""
  now_s = b.now_s
  b.step(*requests, seconds=seconds)
  b.history[-1].update(t=now_s, domain=[rank])
  b.now_s = now_s


def lost(
    goes_on: bool = True, wait: int = 10, **run: Any
) -> list[Event]:
  """Rank 1 with requests 3 and 4 is lost; rank 0 has 1 and 2.

  A step of either takes 2 U and they take turns; ten of each, then the fault.
  `wait` U later those of rank 1 go on, on rank 0; the others at once, or with
  them.
  """
  b = s.Builder("tarragon", **(APART | run))
  for request in (1, 2, 3, 4):
    b.accept(request)
  for _ in range(10):
    b.now_s += U
    steps(b, 0, 1, 2, seconds=2 * U)
    b.now_s += U
    steps(b, 1, 3, 4, seconds=2 * U)
  b.fault(3, 4, ranks=(1,))
  b.detect((1,))
  b.plan(3, 4)
  b.bump()
  for number in range(wait):
    b.now_s += U
    if goes_on and number % 2 == 0:
      steps(b, 0, 1, 2, seconds=2 * U)
  b.write(
      "requests_moved", kind="restore", request_ids=[3, 4], to=[0, 0], tokens=0,
      bytes=0,
  )  # fmt: skip
  b.write("resumed", epoch=1, paused=[3, 4])
  for _ in range(3):
    b.now_s += 2 * U
    steps(b, 0, 1, 2, 3, 4, seconds=2 * U)
  b.finish(1, 2, 3, 4)
  return b.end()
