"""Tokens are those of the collocated deployment, whoever computes what."""

import random

import pytest

from resilient_moe.faults import (
  PROCESS_KINDS,
  Schedule,
  scenario,
  scenario_names,
)
from resilient_moe.recovery import load
from resilient_moe.report.history import of_kind
from tests.runtime.harness import Host, Lab
from tests.runtime.split.apart import (
  ATTENTION,
  QUICK,
  RANKS,
  apart,
  exact,
)
from tests.runtime.watch import Watch
from tests.sim import conform

# (attention, experts, policy, once an expert rank): one copy of each expert,
# two that serve, one that serves and a shadow.
SPLITS = [
  (1, 4, "none", True),
  (3, 2, "none", False),
  (2, 3, "replica_promotion", True),
  (2, 4, "replica_promotion", False),
  (2, 4, "tarragon", True),
]


@pytest.mark.parametrize(("attention", "experts", "policy", "dedup"), SPLITS)
def test_tokens_without_faults(
  lab: Lab, attention: int, experts: int, policy: str, dedup: bool
) -> None:
  case = apart(
    lab, policy, ranks=attention + experts, attention=attention,
    exchange={**QUICK, "dedup": dedup},
  )  # fmt: skip
  host = Host(lab, case)
  exact(lab, _served(host))
  steps = of_kind(host.events, "step")
  assert {tuple(e["domain"]) for e in steps} == {
    (rank,) for rank in range(attention)
  }
  chunked = [e["bucket"] for e in steps if e["prefill_tokens"]]
  assert len(chunked) > len(case.requests), "prompts longer than a chunk"
  assert {r.temperature for r in case.requests} == {0.0, 0.8}


def test_a_token_travels_once_to_a_rank_unless_told_otherwise(
  lab: Lab,
) -> None:
  """All experts on one rank: with k = 2 half of what goes there is saved."""
  sent = {}
  for dedup in (True, False):
    case = apart(
      lab, "none", ranks=2, attention=1, exchange={**QUICK, "dedup": dedup}
    )
    (traffic,) = of_kind(_served(Host(lab, case)).events, "exchange")
    sent[dedup] = traffic["sent_bytes"]
    assert traffic["returned_bytes"] == 2 * sent[True]
  assert sent[False] == 2 * sent[True]


def _served(host: Host) -> Host:
  host.run()
  return host


def here(name: str) -> bool:
  """Whether this runtime has all that a scenario breaks, within a short run."""
  if "twenty" in name:
    return False
  faults = scenario(name, 6, attention=3)
  return not {f.kind for f in faults} & set(PROCESS_KINDS)


SERVED = [n for n in scenario_names(ATTENTION) if here(n)]
# Each scenario and each policy at least once, each policy through the loss of
# an expert rank or of an attention rank; with how many losses it stands.
PAIRS = [
  ("tarragon", "none", 1),
  ("tarragon", "ew_in_experts", 1),
  ("tarragon", "ew_then_aw_during_recovery", 1),
  ("tarragon", "killed_again_and_again", 1),
  ("tarragon", "two_aws_apart", 1),
  ("tarragon", "link_slow", 1),
  ("tarragon", "one_after_another", 1),
  ("kv_restore", "ew_lost", 1),
  ("kv_restore", "aw_in_exchange", 1),
  ("kv_restore", "during_recovery", 2),
  ("mesh_shrink", "ew_in_exchange", 1),
  ("mesh_shrink", "aw_in_prefill", 1),
  ("mesh_shrink", "link_cut", 1),
  ("replica_promotion", "aw_in_attention", 1),
  ("replica_promotion", "straggler", 1),
  ("replica_promotion", "random", 1),
  ("role_switch", "rank_lost_decode", 1),
  ("role_switch", "maintenance", 1),
  ("mask_experts", "ew_and_aw", 1),
  ("retry", "neighbours", 2),
  ("revive_moe", "two_at_once", 1),
  ("revive_moe", "rank_lost_prefill", 1),
  ("revive_moe", "two_ews", 1),
  ("restart_cached", "aw_lost", 1),
]
# What happens next depends on seconds: a link's delay, or the end of a wait.
BY_SECONDS = ("link_slow",)


def test_no_scenario_is_left_out() -> None:
  assert {scenario for _, scenario, _ in PAIRS} == set(SERVED)


def drawn(name: str, attention: int, seed: int) -> Schedule:
  """A scenario that leaves somebody to attend and two to hold experts."""
  for rank in random.Random(seed).sample(range(RANKS), RANKS):
    try:
      faults = scenario(
        name, RANKS, seed, at_step=10, rank=rank, attention=attention
      )
    except ValueError:  # its first victim has the other role
      continue
    struck = {r for f in faults for r in f.ranks}
    aws, ews = set(range(attention)) - struck, set(range(attention, RANKS))
    if faults and faults[-1].after_ready or aws and len(ews - struck) > 1:
      return faults
  raise AssertionError(f"{name} leaves nobody")


@pytest.mark.parametrize(("policy", "name", "losses"), PAIRS)
def test_tokens_through_faults(
  lab: Lab, policy: str, name: str, losses: int, seed: int,
  monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  watch, seen = Watch(monkeypatch), conform.Seen(monkeypatch)
  attention = 3 if name in ("two_aws_apart", "one_after_another") else ATTENTION
  case = apart(
    lab, policy, drawn(name, attention, seed), attention=attention, seed=seed,
    scenario=name, policy_kwargs={"losses": losses} if losses > 1 else {},
    sim={"by_step": True},
  )  # fmt: skip
  host = Host(lab, case)
  host.run()
  struck = of_kind(host.events, "fault")
  said = lab.verdict(host.events)
  # So short a run may end before all are back for the fifth time.
  rest = ["completeness"] if "again" in name and len(struck) > 2 else []
  assert said["failed"] in ([], rest), said
  if load(policy).lossless:
    assert said["checkers"]["exactness"]["value"] == "true"
  assert watch.wrong == []
  if name not in BY_SECONDS:
    assert conform.unlike(case, host.events, seen) == []
  if policy != "restart_cached":
    assert not host.compiled
  if "prefill" in name:
    assert [f["phase"] for f in struck] == ["prefill"]
