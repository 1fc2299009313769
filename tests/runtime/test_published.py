"""Engines of every runtime serve a published checkpoint, and lose a rank.

The same random model lies in both formats; the answers are those of the
fault-free run from our own.
"""

import dataclasses
import functools
import pathlib
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

import resilient_moe as rm
from resilient_moe.faults import Fault
from resilient_moe.recovery import Move, Tier
from resilient_moe.report import verdict
from resilient_moe.report.history import of_kind
from resilient_moe.runtime.checkpoints import open_checkpoint
from resilient_moe.runtime.weights import WeightTiers
from tests.runtime.harness import RANKS, Host, Lab, make_case
from tests.runtime.process.harness import Runs, marking, process_case
from third_party import huggingface as hf

FROM_DISK = {"host_weights": False}


@pytest.fixture(scope="module")
def published(lab: Lab) -> Lab:
  """The same model as Mixtral, in several files."""
  folder = lab.root / "published"
  config, params = rm.load_checkpoint(lab.checkpoint)
  rm.save_huggingface(
    folder, config, params, "mixtral", max_shard_bytes=40_000
  )
  return dataclasses.replace(lab, checkpoint=folder)


def check(lab: Lab, events: list[dict[str, Any]]) -> None:
  verdict = lab.verdict(events)
  assert verdict["overall"] == "true", verdict
  assert of_kind(events, "end")
  copies = [e for e in events if e.get("name") == "CopyExperts"]
  assert copies
  assert {e["tier"] for e in copies} == {"disk"}


def test_both_formats_give_equal_arrays(lab: Lab, published: Lab) -> None:
  readers = [open_checkpoint(x.checkpoint) for x in (lab, published)]
  assert readers[0].config == readers[1].config
  same = np.testing.assert_array_equal
  jax.tree.map(same, *[r.dense() for r in readers])
  jax.tree.map(same, *[r.expert(5) for r in readers])
  for reader in readers:
    reader.release()
  jax.tree.map(same, *[r.experts([2, 7]) for r in readers])
  jax.tree.map(same, *[r.expert(5) for r in readers])


def test_the_tiers_of_a_published_checkpoint(published: Lab) -> None:
  kept = WeightTiers(published.checkpoint)
  assert kept.host_bytes == 8 * 2 * 3 * 32 * 32 * 4
  left = WeightTiers(published.checkpoint, host_copy=False)
  assert not left.in_host_memory
  moves, nobody = [Move(3, 1, 2, source=0)], mock.Mock()
  trees = [
    kept.read(moves, Tier.HOST, nobody), left.read(moves, Tier.DISK, nobody)
  ]  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, *trees)
  assert jax.tree.structure(trees[0][3]) == left.structure


@pytest.mark.parametrize("deployment", ["collocated", "disaggregated"])
def test_an_emulated_engine(
  lab: Lab, published: Lab, deployment: str
) -> None:
  """What is lost is read from the files, and nothing else is."""
  apart = {"deployment": deployment, "attention": 2} if (
    deployment == "disaggregated"
  ) else {}  # fmt: skip
  rank = RANKS - 1  # holds experts in either deployment
  faults = (Fault("rank_lost", (rank,), at_step=8),)
  case = make_case(
    published, "mesh_shrink", faults, policy_kwargs=FROM_DISK, **apart
  )
  real, read = hf.Checkpoint.experts, []
  held: list[int] = []

  def see(backend: Any) -> None:
    held.extend(int(e) for e in backend.view().slots[rank] if e >= 0)

  def experts(self: hf.Checkpoint, which: list[int]) -> dict[int, Any]:
    read.extend(which)
    return real(self, which)

  host = Host(published, case, on_backend=see)
  with mock.patch.object(hf.Checkpoint, "experts", experts):
    host.run()
  check(lab, host.events)
  assert sorted(read) == sorted(held)


@pytest.mark.parametrize("policy", ["mesh_shrink", "kv_restore"])
def test_in_bfloat16_answers_are_exact_too(
  published: Lab, policy: str
) -> None:
  """Whether KV is computed again or restored, on another mesh than before."""
  half = functools.partial(make_case, published, dtype="bfloat16")
  (begun, *twin) = Host(published, half("none")).run()
  sizes: list[int] = []

  def see(backend: Any) -> None:
    sizes.append(backend.view().token_kv_bytes)

  fault = Fault("rank_lost", (1,), at_step=8)
  events = Host(published, half(policy, (fault,)), on_backend=see).run()
  found = verdict(events, [{**begun, "seed": events[0]["seed"]}, *twin])
  assert found["overall"] == "true", found
  assert found["checkers"]["exactness"]["value"] == "true", found
  assert sizes == [2 * 2 * 16 * 2]  # layers, keys and values, width, bytes


@pytest.mark.slow
@pytest.mark.parametrize("deployment", ["collocated", "disaggregated"])
def test_real_processes(
  lab: Lab, published: Lab, deployment: str, tmp_path: pathlib.Path
) -> None:
  fields: dict[str, Any] = {"ranks": 3}
  if deployment == "disaggregated":
    fields |= {"deployment": deployment, "attention": 1}
  fault = Fault("rank_lost", (2,), at_step=8)
  case = process_case(
    published, "mesh_shrink", fault, policy_kwargs=FROM_DISK, **fields
  )
  with marking() as marked:
    events = Runs(published, tmp_path / "run", marked)(case)
  check(lab, events)
