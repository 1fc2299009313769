"""KV checkpoints of real runs."""

import numpy as np
import pytest

from resilient_moe.faults import scenario
from resilient_moe.report.history import of_kind
from resilient_moe.runtime.emulated import EmulatedBackend
from resilient_moe.serving.scheduler import StepBatch
from tests.runtime.drive import Driver
from tests.runtime.harness import RANKS, Host, Lab, make_case, make_requests


@pytest.mark.parametrize("mode", ["peer", "host"])
def test_checkpointed_kv_is_bit_equal_to_the_cache(
  lab: Lab, mode: str
) -> None:
  case = make_case(lab, "kv_restore", policy_kwargs={"checkpoint": mode})
  _, backend = Host(lab, case).start()
  driver = Driver(backend)
  driver.accept(make_requests(n=8))
  driver.step(14)
  saved, keeper = backend.checkpoints(), backend.checkpointer
  assert keeper is not None
  for name, s in driver.state.sequences.items():
    holder = -1 if mode == "host" else (s.rank + 1) % RANKS
    assert saved[name] == (s.computed, holder)
    kv = keeper.restore(name)
    assert kv is not None
    assert np.abs(kv).max() > 0
    cache = backend.store.read_row(s.rank, s.row, s.computed)
    np.testing.assert_array_equal(kv, cache)
  backend.close()


def test_without_room_requests_are_prefilled_again(lab: Lab) -> None:
  def cramp(backend: EmulatedBackend) -> None:
    assert backend.checkpointer is not None
    del backend.checkpointer._free[1:]

  faults = scenario("rank_lost_decode", RANKS, at_step=8, rank=1)
  host = Host(lab, make_case(lab, "kv_restore", faults), on_backend=cramp)
  host.run()
  assert lab.verdict(host.events)["overall"] == "true"
  texts = {e["text"] for e in of_kind(host.events, "warning")}
  assert any("no room to checkpoint" in text for text in texts)
  moved = of_kind(host.events, "requests_moved")
  assert sum(e["tokens"] for e in moved if e["kind"] == "recompute") > 0


def test_who_lost_its_mirror_gets_another(lab: Lab) -> None:
  """Rank 0's KV lay with rank 1; afterwards it lies with rank 2."""
  faults = scenario("rank_lost_decode", RANKS, at_step=8, rank=1)
  held: list[dict[str, tuple[int, int]]] = []

  def spy(backend: EmulatedBackend) -> None:
    step = backend.step

    def watched(batch: StepBatch) -> np.ndarray:
      said = backend.checkpoints()
      here = [r.request_id for r in batch.rows if batch.mesh[r.place] == 0]
      held.append({name: said.get(name, (0, -2)) for name in here})
      return step(batch)

    backend.step = watched  # type: ignore[method-assign]

  host = Host(lab, make_case(lab, "kv_restore", faults), on_backend=spy)
  host.run()
  holders = [{h for _, h in at.values()} for at in held if "r0" in at]
  assert holders[5] == {1}
  assert 2 in holders[-1]
  assert 1 not in holders[-1]
  assert held[-1].get("r0", (30, 2))[0] > 20
