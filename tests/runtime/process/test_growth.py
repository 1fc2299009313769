"""Lost ranks come back, rank 0 as any other, as often as they are lost.

One run: rank 0 is lost three times, then rank 2, whose first replacement is
killed while it starts. Requests come in bursts; the next burst is waited for
until the repair is done, so each loss strikes a whole instance.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

from resilient_moe.faults import Fault
from resilient_moe.report import verdict
from resilient_moe.report.history import of_kind
from resilient_moe.serving.request import Request
from tests.runtime.harness import MODEL, RANKS, Host, Lab, make_case
from tests.runtime.process.harness import (
  Event,
  Runs,
  kinds,
  marking,
  process_case,
)

pytestmark = pytest.mark.slow

LOSSES = (0, 0, 0, 2)
GAP = 1000  # steps between two bursts: none is that long
FIRST = 120  # requests of the first burst: served longer than a start takes
KWARGS = {"replace": True, "rearm": True}


class Grown(NamedTuple):
  events: list[Event]
  twin: list[Event]
  killed: list[int]  # processes of rank 2 that died as they started


def bursts() -> tuple[Request, ...]:
  rng = np.random.default_rng(3)
  counts = [FIRST, *[9] * len(LOSSES)]
  at = [k * GAP for k, count in enumerate(counts) for _ in range(count)]
  return tuple(
    Request(
      f"r{i}", tuple(rng.integers(0, MODEL.vocab_size, 6 + i % 20).tolist()),
      max_new_tokens=20 + i % 5, seed=i, temperature=0.8 * (i % 2),
      arrival_step=step,
    )
    for i, step in enumerate(at)
  )  # fmt: skip


@pytest.fixture(scope="module")
def grown(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Grown:
  faults = [
    Fault("rank_lost", (rank,), at_step=k * GAP + 6, after_ready=True)
    for k, rank in enumerate(LOSSES)
  ]
  case = process_case(
    lab, "kv_restore", *faults, policy_kwargs=KWARGS, requests=bursts()
  )
  killed: list[int] = []
  with marking() as marked:

    def progress(event: Event) -> None:
      starts = event.get("name") == "LaunchRank"
      if starts and event["explain"].endswith("2") and not killed:
        killed.append(marked.wait("rank=2", "incarnation=1"))
        marked.kill("rank=2", "incarnation=1")

    runs = Runs(lab, tmp_path_factory.mktemp("grown") / "run", marked)
    events = runs(case, progress)
  twin = Host(lab, make_case(lab, "none", requests=bursts())).run()
  return Grown(events, twin, killed)


def since_last(events: list[Event], **fields: Any) -> list[Event]:
  """What came after the last event with these fields."""
  at = [i for i, e in enumerate(events) if fields.items() <= e.items()]
  return events[at[-1] + 1 :]


def test_no_token_changes(grown: Grown) -> None:
  said = verdict(grown.events, grown.twin)
  assert said["failed"] == [], said
  assert said["checkers"]["exactness"]["value"] == "true"


def test_whoever_is_lost_is_back_before_the_next_loss(grown: Grown) -> None:
  assert kinds(grown.events, "fault", "ranks") == [[r] for r in LOSSES]
  meshes = kinds(grown.events, "epoch", "mesh")
  sizes = [len(m) for m in meshes]
  full = list(range(RANKS))
  assert meshes[0] == meshes[-1] == full
  changes = [m for m, before in zip(meshes[1:], meshes, strict=False)
             if m != before]  # fmt: skip
  assert changes == [
    mesh for rank in LOSSES
    for mesh in ([r for r in full if r != rank], full)
  ]  # fmt: skip
  assert min(sizes) == RANKS - 1


def test_service_goes_on_while_a_replacement_starts(grown: Grown) -> None:
  names = [e.get("name", e["event"]) for e in grown.events]
  started = names[names.index("LaunchRank") : names.index("Rejoin")]
  assert started.count("step") > 10
  later = names[names.index("Rejoin") :]
  assert "step" in later[: later.index("fault")], "it joins with traffic"


def test_after_it_everything_is_as_before(grown: Grown) -> None:
  """Full redundancy, and every single loss would find its mesh ready."""
  tail = since_last(grown.events, event="resumed")
  assert kinds(tail, "redundancy", "full") == [True]
  rejoined = since_last(grown.events, name="Rejoin")
  ready = {tuple(a) for a in kinds(rejoined, "mesh_ready", "absent")}
  # Without 2 it has just served.
  assert ready == {(0,), (1,), (3,)}
  done = of_kind(grown.events, "action")
  fetched = [
    e["outcome"] for e in done
    if (e["part"], e["name"]) == ("resume", "FetchExecutable")
  ]  # fmt: skip
  assert set(fetched) == {"warm"}
  assert len(fetched) >= len(LOSSES)


def test_a_replacement_that_dies_as_it_starts_is_replaced(
  grown: Grown,
) -> None:
  assert len(grown.killed) == 1
  done = of_kind(grown.events, "action")
  launched = [e["explain"][-1] for e in done if e["name"] == "LaunchRank"]
  assert launched == ["0", "0", "0", "2", "2"]
  assert kinds(grown.events, "failure", "ranks")[-2:] == [[2], [2]]
