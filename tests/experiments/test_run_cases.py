"""The runs of a comparison, and what is refused before any of them."""

import dataclasses

import pytest

from configs import disaggregated, quickstart, runlocal
from experiments import cases, settings
from resilient_moe.runtime.case import make_policy
from tests.experiments.run_fake import tiny


def _jobs(tmp_path, **changes):
  return cases.jobs(settings.read(tiny(tmp_path, **changes)))


def test_the_twin_comes_first_for_each_scenario_and_seed(tmp_path):
  jobs = _jobs(tmp_path, policies="kv_restore,none,retry", seeds="0,3",
               scenarios="rank_lost_decode,neighbours")  # fmt: skip
  assert [(j.case.scenario, j.case.seed, j.case.policy) for j in jobs] == [
    (scenario, seed, policy)
    for scenario in ("rank_lost_decode", "neighbours")
    for seed in (0, 3)
    for policy in ("none", "kv_restore", "retry")
  ]
  assert str(jobs[-1].place) == "neighbours/retry/seed3"
  assert str(jobs[-1].twin_place) == "neighbours/none/seed3"


def test_policies_get_the_same_requests_and_faults_and_the_twin_no_fault(
  tmp_path,
):
  twin, *others = (job.case for job in _jobs(tmp_path))
  assert twin.faults == ()
  assert {c.requests for c in others} == {twin.requests}
  assert len({c.faults for c in others}) == 1
  assert others[0].faults[0].at_step == 3


def test_seeds_change_the_requests(tmp_path):
  first, second = (
    _jobs(tmp_path, seeds=seed)[0].case.requests for seed in (0, 1)
  )
  assert first != second


def test_without_faults_nothing_breaks_under_any_policy(tmp_path):
  jobs = _jobs(tmp_path, faults="none")
  assert {j.case.scenario for j in jobs} == {"none"}
  assert all(not j.case.faults for j in jobs)


def test_listed_faults_make_a_scenario_of_their_own(tmp_path):
  fault = {"kind": "rank_lost", "ranks": [1], "at_tokens": 9}
  case = _jobs(tmp_path, faults=[fault])[1].case
  assert case.scenario == "custom"
  assert (case.faults[0].ranks, case.faults[0].at_tokens) == ((1,), 9)


def test_arguments_reach_their_policy_also_in_line_with_others(tmp_path):
  jobs = _jobs(
    tmp_path,
    policies="kv_restore,kv_restore+restart_cached,mesh_shrink",
    policy_kwargs={"kv_restore": {"checkpoint": "host"}},
  )
  kwargs = [dict(job.case.policy_kwargs) for job in jobs]
  assert kwargs == [{}, {"checkpoint": "host"}, {"checkpoint": "host"}, {}]


def test_a_digest_says_what_was_run_and_not_where_it_lies(tmp_path):
  first = _jobs(tmp_path / "a")
  assert [j.digest for j in first] == [j.digest for j in _jobs(tmp_path / "b")]
  for changes in (
    {"ranks": 5},
    {"workload": {"count": 3}},
    {"options": {"max_len": 256}},
  ):
    other = _jobs(tmp_path / "a", **changes)
    assert not {j.digest for j in first} & {j.digest for j in other}
  later = _jobs(tmp_path / "a", fault_step=4)
  assert [a.digest == b.digest for a, b in zip(first, later, strict=True)] == [
    True,  # the twin
    False,
    False,
  ]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"policies": "nonsense"}, "unknown policy 'nonsense'; choices: .*retry"),
    ({"policies": "retry+nonsense"}, "unknown policy 'nonsense'"),
    (
      {"policy_kwargs": {"kv_restore": {"tier": 1}}},
      "policy 'kv_restore': .*'tier'; keywords: checkpoint",
    ),
    ({"policy_kwargs": {"x": {"y": 1}}}, "unknown policy 'x'"),
    ({"scenarios": "nonsense"}, "unknown scenario 'nonsense'; .*at_once"),
    (
      {"options": {"dispatch": "x"}},
      "dispatch='x': choose one of all_to_all, all_gather",
    ),
    ({"options": {"nonsense": 1}}, "config.options.nonsense: .*choices: rows"),
    ({"options": {"rows": "four"}}, r"config\.options: "),
    ({"runtime": "threads"}, "runtime='threads': .*emulated, logical"),
    ({"deployment": "apart"}, "deployment='apart': choose one of collocated"),
    ({"attention": 1}, "config.attention=1 .*=collocated: choices: 0"),
    (
      {"deployment": "disaggregated", "attention": 4},
      "config.attention=4 of 4 ranks: at most 3",
    ),
    (
      {"deployment": "disaggregated", "runtime": "logical"},
      "disaggregated runs on: emulated, process",
    ),
    ({"scenarios": "ew_lost"}, "'ew_lost' needs a disaggregated deployment"),
    ({"exchange": {"lag": 1}}, "config.exchange.lag: .*choices: dedup, late_s"),
    ({"exchange": {"stores": 0}}, "config.exchange: exchange.stores=0"),
    ({"checkpoint": "/none"}, "config.checkpoint='/none': .*ships: byte_moe"),
    (
      {"options": {"max_len": 12}},
      "request r0000: .* new tokens are longer than the cache's 12 positions; "
      "raise config.options.max_len",
    ),
    ({"workload": {"nonsense": 1}}, "config.workload: .*arguments: count,"),
    ({"workload": {"count": 0}}, "config.workload.count=0: at least 1"),
    ({"workload": {"count": 1, "new_tokens": 3}}, r"config\.workload: "),
    ({"fault_rank": 4}, "rank 4 is out of range; 4 ranks have ids 0 to 3"),
    ({"ranks": 1}, "'rank_lost_decode' needs at least 2 ranks, not 1"),
    (
      {"faults": [{"kind": "rank_lost", "ranks": [9], "at_step": 1}]},
      "rank 9 is out of range",
    ),
    (
      {"faults": [{"kind": "rank_lost", "ranks": [0, 1, 2, 3], "at_s": 1.0}]},
      "takes 4 of 4 ranks at once; at most 3 can be survived",
    ),
  ],
)
def test_what_cannot_work_is_refused_before_it_starts(
  tmp_path, changes, message
):
  with pytest.raises(ValueError, match=message):
    _jobs(tmp_path, **changes)


def test_a_corrupt_checkpoint_is_refused(tmp_path):
  config = tiny(tmp_path)
  manifest = tmp_path / "model" / "manifest.json"
  manifest.write_text('{"config.json": [7, 7]}')
  with pytest.raises(ValueError, match="corrupt checkpoint: config.json has 2"):
    cases.jobs(settings.read(config))
  manifest.write_text('{"config')
  with pytest.raises(ValueError, match=r"config\.checkpoint="):
    cases.jobs(settings.read(config))


def test_records_of_before_there_were_two_deployments_stay_the_same(tmp_path):
  """Or every work directory from before would be another config's."""
  record = _jobs(tmp_path)[1].record
  assert not {"attention", "exchange"} & record.keys()
  assert not {"delay_s", "inside"} & record["faults"][0].keys()
  # One that was written by the version of before.
  assert _jobs(tmp_path)[1].digest == "fd1a26fe40f8137e"
  apart = {"deployment": "disaggregated", "exchange": {"dedup": False}}
  record = _jobs(tmp_path, scenarios="ew_in_experts", **apart)[1].record
  assert (record["attention"], record["exchange"]) == (1, {"dedup": False})
  assert record["faults"][0]["inside"] == "experts"
  assert "delay_s" not in record["faults"][0]
  slow = _jobs(tmp_path, scenarios="link_slow", **apart)[1].record
  assert slow["faults"][0]["delay_s"] > 0


@pytest.mark.parametrize("kind", ["link_cut", "link_slow", "straggler"])
def test_what_takes_nobody_may_strike_everybody(tmp_path, kind):
  fault = {"kind": kind, "ranks": [0, 1], "at_step": 1}
  fault |= {"link_slow": {"delay_s": 0.1}, "straggler": {"slowdown": 2.0}}.get(
    kind, {}
  )
  apart = {"deployment": "disaggregated", "ranks": 2, "attention": 1}
  jobs = _jobs(tmp_path, faults=[fault], policies="tarragon", **apart)
  assert jobs[1].case.faults[0].kind == kind
  lost = {"kind": "rank_lost", "ranks": [0, 1], "at_step": 1}
  with pytest.raises(ValueError, match="takes 2 of 2 ranks at once"):
    _jobs(tmp_path, faults=[lost], policies="tarragon", **apart)


@pytest.mark.parametrize("config", [quickstart, runlocal, disaggregated])
def test_the_configs_that_ship_can_be_run(tmp_path, config):
  chosen = settings.read(config.get_config())
  # The weights may be on their way to a new version; the rest must fit.
  model = tiny(tmp_path).checkpoint
  jobs = cases.jobs(dataclasses.replace(chosen, checkpoint=model))
  runs = len(chosen.policies) * len(chosen.scenarios) * len(chosen.seeds)
  assert len(jobs) == runs
  for job in jobs:
    make_policy(job.case)  # of the deployment


def test_the_comparison_apart_is_the_same_on_both_runtimes(tmp_path):
  config = disaggregated.get_config()
  config.checkpoint = tiny(tmp_path).checkpoint
  process = cases.jobs(settings.read(config))
  config.runtime = "emulated"
  emulated = cases.jobs(settings.read(config))
  for job, other in zip(process, emulated, strict=True):
    case, same = job.case, other.case
    assert (case.ranks, case.attention, case.options["rows"]) == (6, 2, 4)
    assert (case.requests, case.faults) == (same.requests, same.faults)
    # Rows for all at once, so that everybody decodes when the fault strikes.
    assert len(case.requests) == case.attention * case.options["rows"]
