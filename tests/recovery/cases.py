"""What the tests of recovery share: views, failures, comparisons."""

import dataclasses

import numpy as np

from resilient_moe import recovery as rm

# ranks, experts, hosts and racks: square, uneven, tiny, several domains.
SIZES = {
  "8x16": {"ranks": 8, "experts": 16},
  "3x7": {"ranks": 3, "experts": 7},
  "2x4": {"ranks": 2, "experts": 4},
  "12x8-hosts": {
    "ranks": 12,
    "experts": 8,
    "ranks_per_host": 4,
    "hosts_per_rack": 2,
  },
  "16x64-racks": {
    "ranks": 16,
    "experts": 64,
    "ranks_per_host": 2,
    "hosts_per_rack": 4,
  },
}

# The same where attention and experts are on different ranks.
APART = {
  "1+2x4": {"ranks": 3, "attention": 1, "experts": 4},
  "2+4x8": {"ranks": 6, "attention": 2, "experts": 8},
  "3+5x16": {"ranks": 8, "attention": 3, "experts": 16},
}


def serving(policy: rm.RecoveryPolicy, size: str, requests: int = 0):
  """The view in mid-decode that `policy` has prepared; 2 requests a rank."""
  view = bare(policy, size)
  return rm.start(policy, view, requests or 2 * len(view.mesh))


# One size of each deployment, for questions that need only one.
MEDIUM = ("8x16", "3+5x16")


def sizes(policy: rm.RecoveryPolicy) -> list[str]:
  """The sizes of the deployments that `policy` is for."""
  of = {"collocated": SIZES, "disaggregated": APART}
  return [size for d in policy.deployments for size in of[d]]


def bare(policy: rm.RecoveryPolicy, size: str) -> rm.ClusterView:
  """What `policy` prepares on."""
  return rm.bare_view(spares=policy.spares, **(SIZES | APART)[size])


def failures(view: rm.ClusterView) -> dict[str, rm.Failure]:
  """One of each kind, and several ranks at once."""
  if view.disaggregated:
    return failures_apart(view)
  last = int(view.mesh[-1])
  cases: dict[str, rm.Failure] = {
    "first": rm.RanksLost((0,)),
    "last": rm.RanksLost((last,)),
    "leaving": rm.RanksLeaving((1,), 2.0),
    "slow": rm.Straggler(0, 4.0),
  }
  if len(view.mesh) > 2:
    cases["two"] = rm.RanksLost((0, last))
  if len(view.status) > len(view.mesh):
    cases["spare"] = rm.RanksLost((len(view.status) - 1,))
  return cases


def failures_apart(view: rm.ClusterView) -> dict[str, rm.Failure]:
  """The same where ranks attend (the first) or hold experts (the others)."""
  attend = np.flatnonzero(view.role == rm.Role.ATTENTION).tolist()
  hold = np.flatnonzero(view.role == rm.Role.EXPERT).tolist()
  cases: dict[str, rm.Failure] = {
    "expert": rm.RanksLost((hold[0],)),
    "attention": rm.RanksLost((attend[-1],)),
    "both": rm.RanksLost((attend[0], hold[-1])),
    "two experts": rm.RanksLost((hold[0], hold[-1])),
    "all attention": rm.RanksLost(tuple(attend)),
    "all experts": rm.RanksLost(tuple(hold)),
    "leaving expert": rm.RanksLeaving((hold[1],), 2.0),
    "leaving attention": rm.RanksLeaving((attend[0],), 2.0),
    "slow": rm.Straggler(hold[0], 4.0),
    "link": rm.LinkLost(attend[0], hold[0]),
  }
  return cases


def after(view: rm.ClusterView, failure: rm.Failure) -> rm.ClusterView:
  """Ground truth: what is left when `failure` is reported."""
  if isinstance(failure, rm.RanksLost):
    return rm.lose(view, failure.ranks)
  return view


def frozen(value: object) -> object:
  """A value that compares equal if the arrays inside are equal."""
  if isinstance(value, np.ndarray):
    return (value.dtype.str, value.shape, value.tobytes())
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = dataclasses.fields(value)
    inside = (frozen(getattr(value, f.name)) for f in fields)
    return (type(value).__name__, *inside)
  if isinstance(value, tuple):
    return tuple(frozen(item) for item in value)
  return value


def held(view: rm.ClusterView, expert: int) -> set[int]:
  """The ranks whose memory can be read and holds `expert`."""
  holders = (view.slots == expert).any(axis=1) & view.alive()
  return set(np.flatnonzero(holders).tolist())


def start(policy="kv_restore", size="8x16"):
  return serving(rm.load(policy), size)


def shrunk(view, gone=3):
  """The view without `gone`, executable fetched, experts still missing."""
  left = tuple(r for r in view.mesh.tolist() if r != gone)
  name = frozenset({gone})
  actions = (rm.Fence((gone,)), rm.RebuildMesh(left), rm.FetchExecutable(name))
  return rm.advance_all(view, actions)
