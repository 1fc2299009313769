"""Every tier has the same bytes."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from resilient_moe.faults import scenario
from resilient_moe.recovery import Move, Tier
from resilient_moe.runtime.weights import Tree, WeightTiers
from tests.runtime.harness import Host, Lab, make_case

MOVES = (Move(3, 1, 2, source=0), Move(6, 2, 2, source=0))


def nobody(rank: int, expert: int) -> Tree:
  raise AssertionError(f"asked rank {rank} for expert {expert}")


def test_peer_host_and_disk_give_equal_bytes(lab: Lab) -> None:
  _, backend = Host(lab, make_case(lab, "mesh_shrink")).start()
  slots = backend.view().slots

  def peer(rank: int, expert: int) -> Tree:
    assert rank == 0, "the source that the move names"
    holder, slot = np.argwhere(slots == expert)[0].tolist()
    return backend.store.read_slot(holder, slot)

  read = {
    tier: backend.weights.read(MOVES, tier, peer if tier == Tier.PEER else
                               nobody)
    for tier in (Tier.PEER, Tier.HOST, Tier.DISK)
  }  # fmt: skip
  backend.close()
  for trees in read.values():
    assert set(trees) == {3, 6}
    same = np.testing.assert_array_equal
    jax.tree.map(same, trees, read[Tier.DISK])
  three, six = (jax.tree.leaves(read[Tier.DISK][e])[0] for e in (3, 6))
  assert not np.array_equal(three, six)


def test_a_host_copy_is_kept_or_not(lab: Lab) -> None:
  weights = WeightTiers(lab.checkpoint)
  assert weights.in_host_memory
  assert weights.host_bytes == 8 * 2 * 3 * 32 * 32 * 4
  weights = WeightTiers(lab.checkpoint, host_copy=False)
  assert not weights.in_host_memory
  assert weights.host_bytes == 0
  with pytest.raises(ValueError, match=r"experts \[3, 6\] are not in host"):
    weights.read(MOVES, Tier.HOST, nobody)
  assert set(weights.read(MOVES, Tier.DISK, nobody)) == {3, 6}


def test_an_unknown_tier_names_the_choices(lab: Lab) -> None:
  weights = WeightTiers(lab.checkpoint)
  with pytest.raises(ValueError, match="'store' is not part of.*peer, host"):
    weights.read(MOVES, Tier.STORE, nobody)


def test_the_plan_chooses_the_tier_and_the_history_says_it(lab: Lab) -> None:
  """Without a host copy the lost experts come from disk."""
  faults = scenario("rank_lost_decode", 4, at_step=8, rank=1)
  tiers = {}
  for host_weights in (True, False):
    kwargs = {"host_weights": host_weights}
    case = make_case(lab, "mesh_shrink", faults, policy_kwargs=kwargs)
    host = Host(lab, case)
    host.run()
    assert lab.verdict(host.events)["overall"] == "true"
    copies = [e for e in host.events if e.get("name") == "CopyExperts"]
    tiers[host_weights] = [(e["tier"], e["bytes"]) for e in copies]
  size = 2 * 2 * 3 * 32 * 32 * 4  # two experts of two layers
  assert tiers == {True: [("host", size)], False: [("disk", size)]}


def test_a_corrupt_checkpoint_is_one_error(
  lab: Lab, tmp_path: pathlib.Path
) -> None:
  broken = tmp_path / "broken"
  shutil.copytree(lab.checkpoint, broken)
  largest = max((broken / "params").rglob("*"), key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-10])
  case = dataclasses.replace(
    make_case(lab, "mesh_shrink"), checkpoint=str(broken)
  )
  with pytest.raises(ValueError, match="corrupt checkpoint: .* bytes and CRC"):
    Host(lab, case).start()
