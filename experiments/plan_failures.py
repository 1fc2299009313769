"""Which failures a fleet survives, by really asking the policies.

Each policy prepares on a view of the fleet's size, requests sit on every row,
and ranks are taken away. A plan is checked before it counts. The view holds
tables and no weights, so that thousands of ranks take seconds.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.plan_memory import Fleet, held, room_for_copies, short_bytes
from resilient_moe import recovery
from resilient_moe.recovery.checks import expert_ranks, request_ranks
from resilient_moe.recovery.view import ClusterView

FIT = "fit"  # for `replicas` and `shadows`: as many copies as there is room
YES, LOSSY, NO = "yes", "lossy", "no"


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a policy says to the failures of one kind."""

  asked: int
  survived: int
  lossy: int  # of them with experts masked
  how: str  # the most that any plan does, or why there is none

  @property
  def text(self) -> str:
    word = YES if self.survived == self.asked else NO
    if 0 < self.survived < self.asked:
      word = f"{self.survived} of {self.asked}"
    elif word == YES and self.lossy:
      word = LOSSY
    return f"{word}: {self.how}" if self.how else word


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A policy on a fleet."""

  axis: str
  slots: int  # of a rank
  copies: int  # of experts beyond the first, empty slots not counted
  rows: int  # of a rank
  short_bytes: int  # that a rank lacks for it
  answers: Mapping[str, Answer]


def bare(fleet: Fleet, hosts: tuple[int, int], spares: int) -> ClusterView:
  """The view that a policy prepares on; `hosts`: ranks a host, hosts a rack."""
  return recovery.bare_view(
    fleet.ranks,
    fleet.config.n_experts,
    spares=spares,
    top_k=fleet.config.top_k,
    rows_per_rank=fleet.rows,
    ranks_per_host=hosts[0],
    hosts_per_rack=hosts[1],
    expert_bytes=fleet.size.expert_bytes,
    token_kv_bytes=fleet.size.token_kv_bytes,
    attention=fleet.attention,
  )


def survey(
  fleet: Fleet,
  axes: Mapping[str, Mapping[str, Any]],
  hosts: tuple[int, int],
  most: int,
) -> list[Outcome]:
  """Asks every policy about every kind of failure, `most` of each."""
  found = []
  for axis, chosen in axes.items():
    policy = _policy(fleet, axis, chosen)
    bare_view = bare(fleet, hosts, policy.spares)
    if recovery.misplaced(policy.name, policy.deployments, bare_view):
      continue
    standing = policy.prepare(bare_view)
    mirrored = standing.checkpoint == "peer"
    kinds = held(
      fleet, standing.slots.shape[1], standing.rows_per_rank, mirrored
    )
    view = recovery.with_requests(
      recovery.stand(bare_view, standing),
      fleet.rows * fleet.attending,
      prompt_tokens=fleet.context // 2,
      emitted_tokens=fleet.context // 4,
      checkpoint=standing.checkpoint,
    )
    answers = {
      kind: _ask(policy, view, losses)
      for kind, losses in failures(view, most).items()
    }
    found.append(
      Outcome(
        axis=axis,
        slots=standing.slots.shape[1],
        copies=int((standing.slots >= 0).sum()) - fleet.config.n_experts,
        rows=standing.rows_per_rank,
        short_bytes=short_bytes(fleet, kinds),
        answers=answers,
      )
    )
  return found


def _policy(
  fleet: Fleet, axis: str, chosen: Mapping[str, Any]
) -> recovery.RecoveryPolicy:
  kwargs = dict(chosen)
  if "policy" not in kwargs:
    raise ValueError(f"axes.{axis}={kwargs}: needed is `policy`, its name")
  copies = min(room_for_copies(fleet)[1], fleet.config.n_experts)
  kwargs = {k: copies if v == FIT else v for k, v in kwargs.items()}
  return recovery.load(kwargs.pop("policy"), **kwargs)


def failures(view: ClusterView, most: int) -> dict[str, list[tuple[int, ...]]]:
  """Ranks lost together, by kind of failure; at most `most` of each kind.

  Evenly spaced over the fleet. Two ranks lie on different hosts where there
  are several; the worst two hold the same expert.
  """
  holders, attend = expert_ranks(view), request_ranks(view)
  kinds: dict[str, list[tuple[int, ...]]] = {}
  if view.disaggregated:
    kinds["an attention rank"] = [(int(r),) for r in _spread(attend, most)]
  kinds["an expert rank" if view.disaggregated else "a rank"] = [
    (int(r),) for r in _spread(holders, most)
  ]
  if len(holders) > 2:
    half = np.roll(holders, len(holders) // 2)
    pairs = np.stack([holders, half], axis=1)
    kinds["two ranks"] = [_sorted(p) for p in _spread(pairs, most)]
    if twins := _twins(view, most):
      kinds["both copies of an expert"] = twins
  for name, domain in (("a host", view.host), ("a rack", view.rack)):
    groups = [np.flatnonzero(domain == d) for d in np.unique(domain)]
    members = [np.intersect1d(group, view.mesh) for group in groups]
    members = [group for group in members if len(group)]
    if len(members) > 1:
      kinds[name] = [
        _sorted(members[i]) for i in _spread(np.arange(len(members)), most)
      ]
  return kinds


def _twins(view: ClusterView, most: int) -> list[tuple[int, ...]]:
  """The ranks that hold all copies of an expert, where it has two or more."""
  held_by: dict[int, list[int]] = collections.defaultdict(list)
  for rank, slot in np.argwhere(view.slots >= 0):
    held_by[int(view.slots[rank, slot])].append(int(rank))
  experts = np.array(sorted(e for e, at in held_by.items() if len(at) > 1))
  return [_sorted(held_by[int(e)]) for e in _spread(experts, most)]


def _spread(items: np.ndarray, most: int) -> np.ndarray:
  """At most `most` of them, first and last included."""
  if len(items) <= most:
    return items
  return items[np.linspace(0, len(items) - 1, most).round().astype(int)]


def _sorted(ranks: Sequence[int] | np.ndarray) -> tuple[int, ...]:
  return tuple(sorted({int(rank) for rank in ranks}))


def _ask(
  policy: recovery.RecoveryPolicy,
  view: ClusterView,
  losses: list[tuple[int, ...]],
) -> Answer:
  """The policy's plans for these losses, one after the other."""
  survived = lossy = heaviest = 0
  how = refusal = ""
  for ranks in losses:
    plan = recovery.recover_checked(policy, view, recovery.RanksLost(ranks))
    if isinstance(plan, recovery.Infeasible):
      refusal = plan.reason
      continue
    survived += 1
    weight, words, masked = _summary(view, plan)
    lossy += masked
    if weight > heaviest or not how:
      heaviest, how = max(weight, heaviest), words
  return Answer(
    len(losses), survived, lossy, refusal if refusal else how
  )


def _summary(
  view: ClusterView, plan: recovery.Plan
) -> tuple[int, str, bool]:
  """How much a plan does before service goes on: weight, words, lossy."""
  copied: collections.Counter[str] = collections.Counter()
  masked = queued = 0
  words = []
  for action in plan.resume:
    if isinstance(action, recovery.CopyExperts):
      copied[action.tier.value] += len(action.moves)
    elif isinstance(action, recovery.MaskExperts):
      masked += len(action.experts)
    elif isinstance(action, recovery.Requeue):
      queued += len(action.requests)
    elif isinstance(action, recovery.RestartInstance):
      words.append("whole restart")
    elif isinstance(action, recovery.SwitchRole):
      words.append(f"rank {action.rank} switches its role")
  for tier, count in copied.items():
    amount = count * view.expert_bytes / 1e9
    noun = "expert" if count == 1 else "experts"
    words.append(f"{count} {noun} ({amount:.3g} GB) from {tier}")
  if masked:
    words.append(f"masks {masked} of {view.n_experts}")
  if queued:
    words.append(f"{queued} request{'s' * (queued > 1)} wait")
  weight = sum(copied.values()) + masked
  return weight, ", ".join(words) or "no copy", bool(masked)
