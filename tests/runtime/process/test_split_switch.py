"""An attention worker holds experts for as long as their worker is away."""

import pathlib
import re

import pytest

from resilient_moe.report.history import of_kind
from tests.runtime.harness import Lab
from tests.runtime.process.harness import Event, Marked
from tests.runtime.process.split import (
  FEW,
  Engine,
  engine,
  failures,
  lost,
  steps_of,
)

pytestmark = pytest.mark.slow

COPIES = 2  # shapes of an expert's arrays


def switches(events: list[Event]) -> list[int]:
  """Ranks, one a switch."""
  return [
    int(re.findall(r"\d+", e["explain"])[0])
    for e in of_kind(events, "action") if e["name"] == "SwitchRole"
  ]  # fmt: skip


def test_it_attends_again_once_the_other_is_back(
  lab: Lab, tmp_path: pathlib.Path, marked: Marked
) -> None:
  """The second time it is killed while it holds experts."""
  with engine(
    lab, tmp_path, marked, "role_switch", ranks=5, attention=3,
    policy_kwargs={"replace": True},
  ) as served:  # fmt: skip
    compiled = served.call("compiled", 0, 1, 2, 3)
    events = served(lost(4))
    there, back = switches(events)
    assert there == back
    assert there in (0, 1, 2)
    assert all_as_at_first(served)
    for rank, count in served.call("compiled", *compiled).items():
      # Whoever switches copies arrays of a shape that it has not had before.
      assert count <= compiled[rank] + COPIES * (rank == there)

    killed: list[int] = []

    def progress(event: Event) -> None:
      if event.get("name") == "SwitchRole" and not killed:
        killed.extend(switches([event]))
        marked.kill(f"rank={killed[0]}")

    events = served(lost(4), requests=FEW, progress=progress)
    assert failures(events)[0] == ("RanksLost", [4])
    assert [killed[0]] in [ranks for _, ranks in failures(events)]
    others = {0, 1, 2} - set(killed)
    assert all(steps_of(events, rank) for rank in others)
    assert all_as_at_first(served)


def all_as_at_first(served: Engine) -> bool:
  view = served.backend.view()
  return bool(view.alive().all() and (view.role == view.home).all())
