"""Every policy under every scenario, on real arrays, beside its twin.

RMOE_POLICY=my_module.my_policy runs the same tests over another policy; its
promises are then judged, not which losses it must survive.
"""

import os

import pytest

from resilient_moe import recovery
from resilient_moe.faults import SCENARIOS, Schedule, scenario
from resilient_moe.report.history import of_kind
from resilient_moe.serving.recover import Unrecoverable
from tests.runtime.harness import RANKS, Host, Lab, make_case
from tests.runtime.watch import Watch
from tests.sim import conform

OUTSIDE = os.environ.get("RMOE_POLICY")
# Others need roles apart: tests/runtime/split.
POLICIES = [OUTSIDE] if OUTSIDE else [
  name
  for name in recovery.policy_names()
  if "collocated" in recovery.load(name).deployments
]  # fmt: skip
SEVERAL = ("two_at_once", "neighbours", "one_after_another", "during_recovery")
SINGLE = ("rank_lost_decode", "rank_lost_prefill", "random")
# Who stands for one loss only, and gives up at the second.
GIVES_UP = {
  *((p, s) for p in ("mesh_shrink", "retry", "spare") for s in SEVERAL),
  # Its replacement is there before the next one goes.
  *(("eep", s) for s in SEVERAL if s != "one_after_another"),
  *(("none", s) for s in (*SINGLE, *SEVERAL)),
}
RESTARTS = ("restart", "restart_cached")
# Those that need neither real processes nor replacements of what was lost.
SERVED = [
  name
  for name, chosen in SCENARIOS.items()
  if not chosen.tags & {"process", "replaced"}
]
HITTING = [n for n in SERVED if not SCENARIOS[n].tags & {"fault_free", "slow"}]


def faults_of(name: str) -> Schedule:
  return scenario(name, RANKS, seed=1, at_step=8, rank=1)


def serve(lab: Lab, policy: str, name: str, by_step: bool = False) -> Host:
  """`by_step`: checkpoints keep up with the steps (`sim.case`)."""
  case = make_case(
    lab, policy, faults_of(name), scenario=name, sim={"by_step": by_step}
  )
  host = Host(lab, case)
  host.run()
  return host


@pytest.mark.parametrize("policy", ["mesh_shrink", "kv_restore", "spare"])
def test_meshes_become_ready_step_by_step_as_in_a_simulation(
  lab: Lab, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The rank is lost while others' meshes are still to be made ready."""
  seen = conform.Seen(monkeypatch)
  case = make_case(
    lab, policy, scenario("rank_lost_prefill", RANKS, at_step=2, rank=0),
    wait_ready=False, sim={"by_step": True},
  )  # fmt: skip
  host = Host(lab, case)
  host.run()
  assert lab.verdict(host.events)["failed"] == []
  assert conform.unlike(case, host.events, seen) == []
  # One that lacks rank 0 only may have been made ready before; the next not.
  made = of_kind(host.events, "mesh_ready")
  fault = next(e for e in host.events if e["event"] == "fault")
  assert 0 < len([e for e in made if e["t"] < fault["t"]]) < RANKS


def fetched(host: Host) -> list[str]:
  """Where the programs of each new mesh came from."""
  done = of_kind(host.events, "action")
  return [e["outcome"] for e in done if e["name"] == "FetchExecutable"]


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_as_without_faults(
  lab: Lab, policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  watch, seen = Watch(monkeypatch), conform.Seen(monkeypatch)
  if (policy, name) in GIVES_UP:
    with pytest.raises(Unrecoverable, match=f"policy '{policy}' can't"):
      serve(lab, policy, name)
    return
  host = serve(lab, policy, name, by_step=True)
  said = lab.verdict(host.events)
  assert said["failed"] == [], said
  exact = said["checkers"]["exactness"]["value"]
  if recovery.load(policy).lossless and (policy, name) != ("none", "none"):
    assert exact == "true"
  assert watch.wrong == []
  assert conform.unlike(host.case, host.events, seen) == []
  if name in SINGLE and policy not in RESTARTS and not OUTSIDE:
    assert fetched(host) == ["stored" if policy == "not_ready" else "warm"]
    assert host.compiled == 0


@pytest.mark.parametrize("name", HITTING)
def test_the_scenarios_strike_somebody(lab: Lab, name: str) -> None:
  """Else the verdicts above would be true of runs without any loss."""
  events = serve(lab, "restart_cached", name).events
  struck = of_kind(events, "fault")
  temperature = {
    r.request_id: r.temperature for r in make_case(lab, "none").requests
  }
  hit = {temperature[n] for f in struck for n in f["affected"]}
  assert hit == {0.0, 0.8}, "greedy and sampled requests"
  phases = [f["phase"] for f in struck]
  if name == "rank_lost_prefill":
    assert phases == ["prefill"]
  if name == "rank_lost_decode":
    assert phases == ["decode"]


def moved(host: Host) -> dict[str, int]:
  """Tokens prefilled again by each kind of move."""
  total: dict[str, int] = {}
  for e in of_kind(host.events, "requests_moved"):
    total[e["kind"]] = total.get(e["kind"], 0) + e["tokens"]
  return total


@pytest.mark.parametrize(
  "policy", [p for p in POLICIES if p not in ("none", *RESTARTS)]
)
def test_an_announced_loss_costs_nothing(lab: Lab, policy: str) -> None:
  """Drained before the deadline: KV is handed over, nothing prefilled."""
  host = serve(lab, policy, "maintenance")
  assert [f["kind"] for f in of_kind(host.events, "fault")] == ["rank_leaving"]
  assert moved(host) == {"restore": 0}
  assert of_kind(host.events, "step_failed") == []


def test_restored_kv_spares_the_prefill(lab: Lab) -> None:
  again = moved(serve(lab, "mesh_shrink", "rank_lost_decode"))["recompute"]
  assert moved(serve(lab, "kv_restore", "rank_lost_decode")) == {"restore": 0}
  assert again > 20


def test_a_checkpoint_that_died_too_is_prefilled_again(lab: Lab) -> None:
  """Rank 1's KV lies with rank 2, rank 2's with rank 3."""
  host = serve(lab, "kv_restore", "neighbours")
  kinds = {e["kind"] for e in of_kind(host.events, "requests_moved")}
  assert {"restore", "recompute"} <= kinds
  assert moved(host)["recompute"] > 0


def test_the_next_in_line_takes_over(lab: Lab) -> None:
  """The first loss is closed up, the second one restarts the instance."""
  host = serve(lab, "mesh_shrink+restart_cached", "one_after_another")
  assert lab.verdict(host.events)["overall"] == "true"
  assert fetched(host) == ["warm"], "ready although the next in line stores"
  plans = [e["resume"] for e in of_kind(host.events, "plan")]
  assert len(plans) == 2
  assert not any("restart" in line.lower() for line in plans[0])
  assert any("restart" in line.lower() for line in plans[1])
  engines = of_kind(host.events, "engine")
  assert {e["generation"] for e in engines} == {0, 1}
  assert len(host.backends) == 2


def test_a_failure_in_a_recovery_replaces_the_plan(lab: Lab) -> None:
  host = serve(lab, "kv_restore", "during_recovery")
  assert len(of_kind(host.events, "plan")) == 2
  assert len(of_kind(host.events, "resumed")) == 1
  kinds = {e["kind"] for e in of_kind(host.events, "requests_moved")}
  assert "recompute" not in kinds, "the checkpoints were still there"
