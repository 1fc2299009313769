"""Random lives of a cluster: losses, warnings, failures in mid-plan.

A failing seed prints the command that repeats it. RMOE_SEED runs one seed.
"""

import dataclasses
import os

import numpy as np
import pytest

from resilient_moe import recovery as rm

SEEDS = (
  [int(os.environ["RMOE_SEED"])] if "RMOE_SEED" in os.environ else range(120)
)
FAILURES = 8  # in a life
POLICIES = [
  n for n in rm.policy_names()
  if n != "none" and "collocated" in rm.load(n).deployments
]  # fmt: skip


def random_start(rng):
  """A policy with a fallback on a random cluster in mid-decode."""
  ranks = int(rng.integers(2, 13))
  name = str(rng.choice(POLICIES))
  kwargs = {}
  if name not in ("restart", "restart_cached", "spare", "cheapest"):
    kwargs["losses"] = int(rng.integers(1, ranks))
    kwargs["replace"] = bool(rng.integers(2))
    if name != "revive_moe":
      kwargs["rearm"] = bool(rng.integers(2))
  if name in ("replica_promotion", "kv_restore"):
    kwargs["replicas"] = [0, 3, "all"][rng.integers(3)]
    kwargs["shadows"] = bool(rng.integers(2))
  if name == "kv_restore":
    kwargs["checkpoint"] = ["peer", "host"][rng.integers(2)]
  if name == "spare":
    kwargs["spares"] = int(rng.integers(1, 4))
  policy = rm.load(name, **kwargs)
  if rng.integers(2):
    policy = rm.first_feasible(policy, rm.load("restart_cached"))
  view = rm.bare_view(
    ranks,
    int(rng.integers(2, 40)),
    spares=policy.spares,
    top_k=int(rng.integers(1, 3)),
    rows_per_rank=int(rng.integers(1, 5)),
    ranks_per_host=int(rng.integers(0, 4)),
    hosts_per_rack=int(rng.integers(0, 3)),
  )
  return policy, rm.start(policy, view, int(rng.integers(0, 40)))


def random_failure(rng, view):
  """What happens next, and the view that is left when it is reported."""
  alive = np.flatnonzero(view.status != rm.Status.LOST)
  n = min(int(rng.integers(1, 3)), len(alive))
  ranks = tuple(int(r) for r in rng.choice(alive, n, replace=False))
  kind = rng.integers(5)
  if kind == 0:
    return rm.RanksLeaving(ranks, 2.0), view
  if kind == 1:
    return rm.Straggler(ranks[0], 3.0), view
  return rm.RanksLost(ranks), rm.lose(view, ranks)


def decoded(rng, view):
  """Some peace: prefills are done, tokens come, the queue is admitted."""
  table, free = view.requests, view.free_rows()
  rank = table.rank.copy()
  for i in np.flatnonzero(rank < 0):
    if free.max() > 0 and rng.integers(2):
      rank[i] = free.argmax()
      free[rank[i]] -= 1
  emitted = np.where(rank >= 0, table.emitted_tokens + 1, 0)
  kv = np.where(rank >= 0, table.prompt_tokens + emitted - 1, 0)
  requests = dataclasses.replace(
    table,
    rank=rank.astype(np.int32),
    emitted_tokens=emitted.astype(np.int32),
    kv_tokens=kv.astype(np.int32),
  )
  return dataclasses.replace(view, requests=requests)


def routed_right(view):
  """Invariant 5, written out again without the code under test."""
  for expert in range(view.n_experts):
    live = 0
    for rank, slot in view.table.entries[expert]:
      if rank < 0:
        continue
      assert view.status[rank] == rm.Status.SERVING
      assert rank in view.mesh
      assert view.slots[rank, slot] == expert
      live += 1
    assert live or view.masked[expert], f"expert {expert} is not served"


def requests_kept(before, after, policy):
  """Invariant 1 as far as plans go: nobody is dropped or doubled."""
  names = after.requests.request_id
  assert len(set(names)) == len(names)
  if not policy.fails_requests:
    assert names == before.requests.request_id


def live(seed):
  """Goes from failure to failure.

  Returns:
    How many there were, and what came last: a view, or an `Infeasible`.
  """
  rng = np.random.default_rng(seed)
  policy, view = random_start(rng)
  assert rm.servable(view) is None
  end = view
  failure, view = random_failure(rng, view)
  for count in range(1, FAILURES + 1):
    plan = rm.recover_checked(policy, view, failure)
    if isinstance(plan, rm.Infeasible):
      if isinstance(failure, rm.RanksLost):
        return count, plan  # nobody is next in line
      failure, view = random_failure(rng, view)
      continue
    steps = rm.ordered(plan.resume) + rm.ordered(plan.repair)
    stop = int(rng.integers(len(steps) + 1)) if rng.integers(2) else len(steps)
    start = view
    for i, action in enumerate(steps[:stop]):
      epoch = view.epoch
      view = rm.advance(view, action)
      assert view.epoch >= epoch
      assert rm.plannable(view) is None
      assert not (view.masked.any() and policy.lossless)
      if i + 1 >= len(plan.resume):
        assert rm.servable(view) is None
        routed_right(view)
    requests_kept(start, view, policy)
    if stop >= len(plan.resume):
      view = decoded(rng, view)
      assert rm.servable(view) is None
    end = view
    failure, view = random_failure(rng, view)
  return count, end


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_life(seed):
  print(
    "repeat: "
    f"RMOE_SEED={seed} .venv/bin/python -m pytest {os.path.relpath(__file__)}"
  )
  count, end = live(seed)
  if isinstance(end, rm.Infeasible):
    assert end.reason, "a policy that gives up says why"
  else:
    assert count == FAILURES
    assert (end.status != rm.Status.LOST).any(), "somebody is left"
