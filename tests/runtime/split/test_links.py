"""Links that are cut or slow between ranks that live."""

from resilient_moe.faults import Fault, Schedule
from resilient_moe.report.history import of_kind
from tests.runtime.harness import Host, Lab
from tests.runtime.split.apart import (
  LINK_S,
  apart,
  cut,
  exact,
  failures,
  lost,
  names,
)

TOLERATED = ("LinkLost", [0, 2])


def run(lab: Lab, policy: str, faults: Schedule, **kwargs) -> Host:
  host = Host(lab, apart(lab, policy, faults, policy_kwargs=kwargs))
  host.run()
  exact(lab, host)
  return host


def marks(host: Host, rank: int = 0) -> set:
  """Whom an attention rank holds for dead at the end."""
  return set(host.backends[-1].store.routes_of(rank).state()[1])


def test_a_cut_with_other_copies_is_tolerated(lab: Lab) -> None:
  host = run(lab, "tarragon", (cut(0, 2, 10),))
  assert failures(host.events) == [TOLERATED]
  (said,) = of_kind(host.events, "infeasible")
  assert "no need" in said["reason"]
  assert names(host.events) == []
  assert of_kind(host.events, "step_failed") == []
  (healed,) = of_kind(host.events, "healed")
  assert (healed["by"], healed["rank"]) == (0, 2)
  assert LINK_S <= healed["seconds"] < 10 * LINK_S
  assert marks(host) == {(2, 0)}
  assert marks(host, 1) == set()


def test_who_holds_the_only_copy_behind_a_cut_is_fenced(lab: Lab) -> None:
  host = run(lab, "mesh_shrink", (cut(0, 2, 10),))
  assert failures(host.events) == [TOLERATED]
  assert names(host.events)[:2] == ["Fence", "RebuildMesh"]
  assert host.backends[-1].view().mesh.tolist() == [0, 1, 3, 4, 5]
  # That of rank 0, and what rank 1 had begun before the fence.
  assert 1 <= len(of_kind(host.events, "step_failed")) <= 2


def test_a_replacement_has_links_of_its_own(lab: Lab) -> None:
  host = run(lab, "tarragon", (cut(0, 2, 10),), shadows=0)
  assert failures(host.events) == [TOLERATED]
  assert 2 in host.backends[-1].view().mesh
  assert marks(host) == set()


def test_the_copy_that_made_a_cut_bearable_is_lost(lab: Lab) -> None:
  """Who is cut off has the only copies then, and is told of again."""
  host = run(lab, "tarragon", (cut(0, 2, 10), lost(3, at_step=40)),
             replace=False)  # fmt: skip
  first, second, *again = failures(host.events)
  assert (first, second) == (TOLERATED, ("RanksLost", [3]))
  assert again
  assert set(map(str, again)) == {str(TOLERATED)}
  assert host.backends[-1].view().mesh.tolist() == [0, 1, 4, 5]


def test_a_slow_link_is_waited_for(lab: Lab) -> None:
  slow = Fault("link_slow", (0, 2), at_step=10, delay_s=LINK_S / 3)
  host = run(lab, "tarragon", (slow,))
  assert failures(host.events) == []
  assert of_kind(host.events, "healed") == []


def test_a_mended_link_is_used_again(lab: Lab) -> None:
  host = run(lab, "tarragon", (cut(0, 2, 10, resume_s=LINK_S * 1.5),))
  assert failures(host.events) == [TOLERATED]
  assert marks(host) == set()
  assert not host.backends[-1].store.links.cut


def test_a_link_of_a_rank_that_is_gone_mends_for_nobody(lab: Lab) -> None:
  for policy in ("mesh_shrink", "tarragon"):
    broken = cut(1, 2, 10, resume_s=LINK_S * 1.5)
    host = run(lab, policy, (broken, lost(1, at_step=14)))
    assert ("RanksLost", [1]) in failures(host.events)
