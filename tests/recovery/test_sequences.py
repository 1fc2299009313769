"""Random lives of a cluster: losses, warnings, failures in mid-plan.

A failing seed prints the command that repeats it. RMOE_SEED runs one seed.
"""

import dataclasses
import importlib
import inspect
import os

import numpy as np
import pytest

from resilient_moe import recovery as rm

SEEDS = (
  [int(os.environ["RMOE_SEED"])] if "RMOE_SEED" in os.environ else range(120)
)
FAILURES = 8  # in a life
POLICIES = [n for n in rm.policy_names() if n != "none"]


def random_keywords(rng, name, holders):
  """Some of what the policy `name` can be told; `holders` hold experts."""
  some = {
    "losses": int(rng.integers(1, max(holders, 2))),
    "replace": bool(rng.integers(2)),
    "rearm": bool(rng.integers(2)),
    "drain_stragglers": bool(rng.integers(2)),
    "replicas": [0, 3, "all", "30%"][rng.integers(4)],
    "shadows": bool(rng.integers(2)),
    "checkpoint": ["peer", "host"][rng.integers(2)],
    "spares": int(rng.integers(1, 4)),
    "mask_from": int(rng.integers(0, 4)),
    "host_weights": bool(rng.integers(2)),
  }
  if name == "tarragon":
    some["shadows"] = some["replicas"]
  if name in ("restart", "restart_cached"):
    del some["losses"]
  known = inspect.signature(importlib.import_module(f"policies.{name}").make)
  return {k: v for k, v in some.items() if k in known.parameters}


def random_start(rng, deployment):
  """A policy with a fallback on a random cluster in mid-decode."""
  apart = deployment == "disaggregated"
  ranks = int(rng.integers(3, 13)) if apart else int(rng.integers(2, 13))
  attention = int(rng.integers(1, ranks - 1)) if apart else 0
  names = [n for n in POLICIES if deployment in rm.load(n).deployments]
  name = str(rng.choice(names))
  kwargs = random_keywords(rng, name, ranks - attention)
  print(f"policy: {name} {kwargs}; {attention} of {ranks} ranks only attend")
  policy = rm.load(name, **kwargs)
  if rng.integers(2):
    policy = rm.first_feasible(policy, rm.load("restart_cached"))
  view = rm.bare_view(
    ranks,
    int(rng.integers(2, 40)),
    attention=attention,
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
  kind = rng.integers(6 if view.disaggregated else 5)
  if kind == 5:
    attend, hold = (np.flatnonzero(view.home == r) for r in rm.Role if r)
    return rm.LinkLost(int(rng.choice(attend)), int(rng.choice(hold))), view
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
      assert view.role[rank] != rm.Role.ATTENTION
      live += 1
    assert live or view.masked[expert], f"expert {expert} is not served"


def requests_kept(before, after, policy):
  """Invariant 1 as far as plans go: nobody is dropped or doubled."""
  names = after.requests.request_id
  assert len(set(names)) == len(names)
  if not policy.fails_requests:
    assert names == before.requests.request_id


def seated_right(view):
  """The same for requests: they sit with who lives and attends."""
  for rank in view.requests.rank[view.requests.rank >= 0].tolist():
    assert view.status[rank] == rm.Status.SERVING
    assert view.role[rank] != rm.Role.EXPERT


def live(seed, deployment):
  """Goes from failure to failure.

  Returns:
    How many there were, and what came last: a view, or an `Infeasible`.
  """
  rng = np.random.default_rng(seed)
  policy, view = random_start(rng, deployment)
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
        seated_right(view)
    requests_kept(start, view, policy)
    if stop >= len(plan.resume):
      view = decoded(rng, view)
      assert rm.servable(view) is None
    end = view
    failure, view = random_failure(rng, view)
  return count, end


@pytest.mark.parametrize("deployment", rm.DEPLOYMENTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_life(seed, deployment):
  print(
    "repeat: "
    f"RMOE_SEED={seed} .venv/bin/python -m pytest {os.path.relpath(__file__)}"
    f" -k {deployment}"
  )
  count, end = live(seed, deployment)
  if isinstance(end, rm.Infeasible):
    assert end.reason, "a policy that gives up says why"
  else:
    assert count == FAILURES
    assert (end.status != rm.Status.LOST).any(), "somebody is left"
