"""Attention and expert workers are killed; the others hardly notice.

One engine of 2 attention workers (0, 1), 4 expert workers (2 to 5) and 2
stores serves everything here; whoever is lost is replaced behind traffic.
"""

from collections.abc import Iterator

import pytest

from resilient_moe.report.history import of_kind
from tests.runtime.harness import Lab
from tests.runtime.process.harness import actions, kinds, marking, moved
from tests.runtime.process.split import (
  Engine,
  between,
  engine,
  failures,
  lost,
  steps_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(
  lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
  with marking() as marked:
    folder = tmp_path_factory.mktemp("split")
    with engine(
      lab, folder, marked, "tarragon", ranks=6, exchange={"stores": 2}
    ) as made:
      yield made


def test_without_faults_nobody_notices_anything(served: Engine) -> None:
  events = served()
  assert of_kind(events, "healed") == of_kind(events, "step_failed") == []
  assert of_kind(events, "warning") == []


def test_an_expert_workers_end_pauses_nobody(served: Engine) -> None:
  events = served(lost(3))
  assert failures(events) == [("RanksLost", [3])]
  assert of_kind(events, "step_failed") == []
  assert kinds(events, "resumed", "paused") == [[]]
  assert {e["rank"] for e in of_kind(events, "healed")} == {3}
  assert of_kind(events, "requests_moved") == []
  assert actions(events, "Rejoin")
