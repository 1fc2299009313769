"""One disaggregated engine that serves one schedule of faults after another.

To start six processes takes seconds, what happens to them milliseconds. The
policy replaces who is lost, so every schedule finds the engine whole.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from resilient_moe import recovery as rm
from resilient_moe.faults import Fault, Injector
from resilient_moe.report import History, verdict
from resilient_moe.report.history import of_kind
from resilient_moe.runtime import assemble
from resilient_moe.runtime.case import Case
from resilient_moe.runtime.process import supervise
from resilient_moe.runtime.process.split_backend import SplitProcess
from resilient_moe.serving.backend import Outcome
from resilient_moe.serving.loop import serve
from resilient_moe.serving.request import Request
from tests.runtime.harness import Lab, make_requests
from tests.runtime.intake import ListIntake
from tests.runtime.process.harness import (
  LIMIT_S,
  Event,
  Marked,
  at_most,
  process_case,
  seed_store,
)
from tests.runtime.watch import Watch, differences, world

SETTLE_S = 10.0  # for what goes on behind the last step
ALL = make_requests()
FEW = ALL[:3]  # all of them find rows on a single attention worker


def split_case(
  lab: Lab, policy: str, *faults: Fault, attention: int = 2, **fields: Any
) -> Case:
  return process_case(
    lab, policy, *faults, deployment="disaggregated", attention=attention,
    **fields,
  )  # fmt: skip


def check(
  lab: Lab, events: list[Event], policy: str,
  requests: tuple[Request, ...] = ALL,
) -> None:  # fmt: skip
  """All checkers are content, and the answers those of the twin."""
  names = {r.request_id for r in requests}
  twin = [e for e in lab.twin if e.get("request_id", "r0") in names]
  said = verdict(events, twin)
  # Recoveries are short here, and tokens few: who waited may be unknown.
  assert set(said["failed"]) <= {"confined"}, said
  assert said["checkers"].get("confined", {}).get("value") != "false", said
  if rm.load(policy).lossless:
    assert said["checkers"]["exactness"]["value"] == "true"
  assert of_kind(events, "end")


def lost(*ranks: int, **when: Any) -> Fault:
  return Fault("rank_lost", ranks, **{"at_step": 12, **when})


class Facts(Watch):
  """Watches actions while others go on stepping: requests change meanwhile."""

  def _watched(self, action: rm.Action, *args: Any) -> Outcome:
    self.seen.append(type(action).__name__)
    current, backend = args[:2]
    before = world(backend, current.state)
    outcome = self._carry_out(action, *args)
    said = rm.advance(before, action)
    if not outcome.detail.startswith("abandoned"):
      found = differences(backend.view(), said)
      self.wrong += [
        f"after {action}: {line}" for line in found
        if not line.startswith("requests")
      ]  # fmt: skip
    return outcome


class Line(History):
  """A history that tells of each event as it is written."""

  def __init__(self) -> None:
    super().__init__()
    self.hear: Callable[[Event], None] = lambda event: None

  def _record(self, line: str) -> None:
    super()._record(line)
    self.hear(json.loads(line))


class Engine:
  """An engine of real processes, orchestrated from the test's own."""

  def __init__(
    self, lab: Lab, case: Case, backend: SplitProcess, plans: assemble.Plans,
    history: Line,
  ) -> None:  # fmt: skip
    self.lab, self.case, self.backend = lab, case, backend
    self.plans, self.history = plans, history
    self.seen: set[str] = set()  # actions
    self._runs = 0

  def __call__(
    self, *faults: Fault, requests: tuple[Request, ...] = ALL,
    progress: Callable[[Event], None] | None = None, until: str = "run",
  ) -> list[Event]:  # fmt: skip
    """Serves requests under these faults to the end; the events.

    Somebody may still ask something before the event `until` is seen. The
    answers must be the twin's, whoever was lost has been replaced, and
    after every action the world was what `advance` says.
    """
    self._runs += 1
    mark = f"{self._runs}:"  # what a former run has left must not serve
    first = len(self.history)
    history, policy = self.history, self.plans.policy
    history.write(
      "run", policy=self.case.policy, scenario="test", runtime="process",
      deployment=self.case.deployment, seed=0, ranks=self.case.ranks,
      lossless=policy.lossless, exact=True,
      fails_requests=policy.fails_requests, expected_faults=len(faults),
    )  # fmt: skip
    intake = _Clients(history, until)
    for r in requests:
      intake.accept(
        dataclasses.replace(r, request_id=mark + r.request_id)
      )

    def hear(event: Event) -> None:
      intake.hear(event)
      if progress is not None:
        progress(event)

    history.hear = hear
    self.backend.injector = Injector(faults)
    with pytest.MonkeyPatch.context() as patch:
      watch = Facts(patch)
      serve(
        intake, self.backend, policy, history.write,
        chunk=self.plans.shape.options.chunk,
      )  # fmt: skip
    assert watch.wrong == []
    self.seen.update(watch.seen)
    history.hear = lambda event: None
    history.write("end")
    text = json.dumps(history[first:]).replace(f'"{mark}', '"')
    events = json.loads(text)
    check(self.lab, events, self.case.policy, requests)
    return events

  def call(self, op: str, *ranks: int, **args: Any) -> dict[int, Any]:
    return self.backend.crew.call(dict.fromkeys(ranks, args), op).good()

  def pid(self, rank: int) -> int:
    process = self.backend.crew.mate(rank).process
    assert process is not None
    return process.pid

  def held(self, rank: int) -> tuple[int, int]:
    """Open files and threads of a worker."""
    at = pathlib.Path(f"/proc/{self.pid(rank)}")
    return len(os.listdir(at / "fd")), len(os.listdir(at / "task"))

  def until(self, there: Callable[[], Any]) -> None:
    """Polls until something is so."""
    give_up = time.monotonic() + SETTLE_S
    while not there():
      assert time.monotonic() < give_up
      self.backend.poll()
      time.sleep(0.005)


class _Clients(ListIntake):
  """Hears what it is answered."""

  def __init__(self, history: Line, until: str) -> None:
    self._until = until
    self._seen = {"run"}
    super().__init__(
      lambda r: history.write(
        "accepted", request_id=r.request_id, retry_of=r.retry_of,
        prompt_tokens=list(r.prompt), max_new_tokens=r.max_new_tokens,
      )  # fmt: skip
    )

  def closed(self) -> bool:
    return self._until in self._seen and super().closed()

  def hear(self, event: Event) -> None:
    self._seen.add(event["event"])
    if event["event"] == "step":
      for name, _, token in event["emitted"]:
        self.tokens[name].append(token)
    elif event["event"] == "finished":
      self.ended.add(event["request_id"])
    elif event["event"] == "failed":
      self.ended.add(event["request_id"])
      self.failed.append(event["request_id"])


@contextlib.contextmanager
def engine(
  lab: Lab, folder: pathlib.Path, marked: Marked, policy: str, **fields: Any
) -> Iterator[Engine]:
  """Started, and ended without a trace."""
  case = split_case(lab, policy, **fields)
  plans = assemble.plan_instance(case, assemble.Fresh())
  seed_store(lab, case, folder / "executables")
  history = Line()
  with at_most(2 * LIMIT_S, marked):  # it serves many tests
    backend = supervise.assemble(case, plans, assemble.Fresh(), folder, history)
    try:
      assert isinstance(backend, SplitProcess)
      yield Engine(lab, case, backend, plans, history)
    finally:
      backend.close()
  assert marked.left() == []


def steps_of(events: list[Event], rank: int) -> list[Event]:
  """Steps of an attention worker."""
  return [e for e in of_kind(events, "step") if e["domain"] == [rank]]


def between(events: list[Event], first: str, last: str) -> list[Event]:
  """What came after the first `first` and before the next `last`."""
  names = [e["event"] for e in events]
  start = names.index(first) + 1
  return events[start : names.index(last, start)]


def failures(events: list[Event]) -> list[tuple[str, list[int]]]:
  return [(e["kind"], e["ranks"]) for e in of_kind(events, "failure")]
