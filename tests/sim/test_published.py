import pytest

from resilient_moe.recovery import (
  CopyExperts,
  FetchExecutable,
  MaskExperts,
  RanksLost,
  RebuildMesh,
  RestoreKV,
  SwitchRole,
  Tier,
  load,
)
from resilient_moe.sim import (
  published,
  published_eep,
  published_rates,
  published_revive,
  published_tarragon,
)
from resilient_moe.sim.published import CONSTRUCTED, PREDICTED, Row

MODULES = (
  published_revive,
  published_tarragon,
  published_eep,
  published_rates,
)
# Predicted and off by more than a quarter; the README of a paper says so too.
MISSED = {
  "Tarragon: EW failure, from hardware",
  "Tarragon: coarse restart",
  "EEP: 8 lost: GPU to GPU",
  "EEP: 8 lost: recovery",
  "EEP: 16 lost: throughput left",
  "EEP: 1 lost: GPU to GPU, from hardware",
  "EEP: full restart, from hardware",
  "DeepEP: EP8 dispatch",
  "DeepEP: EP8 combine",
  "DeepEP: EP16 dispatch",
}


@pytest.fixture(scope="module")
def rows():
  return {row.name: row for m in MODULES for row in m.compose()}


def test_predictions_are_within_the_target_but_for_those_named(rows):
  found = {r.name for r in rows.values() if r.kind == PREDICTED and not r.hit}
  assert found == MISSED


def test_the_issues_numbers_are_all_there(rows):
  wanted = {
    "ReviveMoE": {83.1, 10.2, 10.7, 10.8, 52.7, 12.8},
    "Tarragon": {64.0, 0.3, 0.4, 0.125},
    "EEP": {10.546, 6.540},
  }
  for system, numbers in wanted.items():
    mine = {r.published for r in rows.values() if r.system == system}
    assert numbers <= mine


def test_what_is_constructed_equals_its_input_or_lacks_stages(rows):
  for row in rows.values():
    if row.kind == CONSTRUCTED and row.case != "baseline, cached restart":
      assert abs(row.error) < 0.02, row.name
  # The paper gives no times for the other 17 s of its restart.
  assert -0.25 < rows["ReviveMoE: baseline, cached restart"].error < -0.15


def test_every_row_names_its_inputs(rows):
  for row in rows.values():
    assert row.inputs
    assert row.kind == PREDICTED or row.inputs != "-", row.name


def _predicted(module):
  return {r.case: r.simulated for r in module.compose() if r.kind == PREDICTED}


@pytest.mark.parametrize(
  ("module", "names"),
  [
    (published_revive, ("REDUNDANT_S", "MISSING_S", "SWITCH_S",
                        "SWITCH_LOAD_S", "COLLOCATED_S", "BASELINE_S")),
    (published_tarragon, ("ATTENTION_S", "COARSE_S", "SHADOW_BYTES")),
    (published_eep, ("BACKUP_BYTES", "RESTART_S", "HEALTHY_TOKENS_PER_S")),
    (published_rates, ("PREFILL_TOKENS_PER_S", "NODE_INPUT_PER_S")),
  ],
)  # fmt: skip
def test_no_prediction_knows_its_own_answer(module, names, monkeypatch):
  before = _predicted(module)
  for name in names:
    monkeypatch.setattr(module, name, 2 * getattr(module, name))
  assert _predicted(module) == before


def test_eep_is_read_off_the_one_rank_case_only(monkeypatch):
  before = _predicted(published_eep)
  other = {
    f: case if f == 1 else published_eep.Case(*(2 * x for x in case))
    for f, case in published_eep.CASES.items()
  }
  monkeypatch.setattr(published_eep, "CASES", other)
  assert _predicted(published_eep) == before


def test_deepeps_latencies_are_not_inputs(monkeypatch):
  before = _predicted(published_rates)
  doubled = {n: (2 * a, 2 * b) for n, (a, b) in published_rates.DEEPEP.items()}
  monkeypatch.setattr(published_rates, "DEEPEP", doubled)
  assert _predicted(published_rates) == before


def _plan(lost, apart, **kwargs):
  view = published_revive._view("revive_moe", apart, 4, **kwargs)
  policy = load("revive_moe", **kwargs)
  return published.plan_for(policy, view, RanksLost((lost,))).plan


@pytest.mark.parametrize(
  ("lost", "apart", "kwargs", "has", "lacks"),
  [
    (48, 48, {}, RebuildMesh, CopyExperts),
    (48, 48, {"replicas": 0, "mask_from": 32}, MaskExperts, CopyExperts),
    (48, 48, {"replicas": 0, "losses": 0}, SwitchRole, MaskExperts),
    (3, 0, {}, FetchExecutable, CopyExperts),
  ],
)
def test_the_plans_are_the_papers_scenarios(lost, apart, kwargs, has, lacks):
  kinds = {type(a) for a in _plan(lost, apart, **kwargs).resume}
  assert has in kinds
  assert lacks not in kinds


def test_the_role_switch_reads_a_ranks_experts_from_disk():
  plan = _plan(48, 48, replicas=0, losses=0)
  copy = next(a for a in plan.resume if isinstance(a, CopyExperts))
  assert copy.tier == Tier.DISK
  assert len(copy.moves) == 8  # 256 experts on 32 ranks
  assert len({m.rank for m in copy.moves}) == 1


def test_the_attention_workers_requests_come_from_the_store():
  view = published_tarragon._view("tarragon", 4, 64)
  plan = published.plan_for(load("tarragon"), view, RanksLost((0,))).plan
  restored = next(a for a in plan.resume if isinstance(a, RestoreKV))
  assert restored.tier == Tier.HOST
  assert len(restored.requests) == 4


def test_assumptions_that_should_not_matter_do_not():
  near = {r.case: r for r in published_revive.compose(rows=4)}
  for row in published_revive.compose(rows=16):
    assert near[row.case].simulated == pytest.approx(row.simulated, rel=0.03)
  more = {r.case: r for r in published_eep.compose(slots_per_rank=17)}
  for row in published_eep.compose(slots_per_rank=16):
    if "share of slots" in row.case and not row.case.startswith("1 "):
      found = more[row.case].simulated
      assert found == pytest.approx(row.simulated, rel=0.1), row.case


def test_too_many_slots_are_refused():
  with pytest.raises(ValueError, match="40 slots a rank: 552 of 256"):
    published_eep.placement(40)


def test_a_row_knows_its_error():
  row = Row("a", "b", "s", 10.0, 12.0, PREDICTED, "-")
  assert row.error == pytest.approx(0.2)
  assert row.hit
  other = Row("a", "c", "s", 10.0, 5.0, PREDICTED, "-")
  assert not other.hit
  found = published.summary([row, other, Row("a", "d", "s", 1, 1, CONSTRUCTED,
                                             "itself")])  # fmt: skip
  assert (found["predicted"], found["within_target"]) == (2, 1)
  assert found["median_abs_error"] == pytest.approx(0.35)
  with pytest.raises(ValueError, match="kind='tuned'.*by construction"):
    Row("a", "b", "s", 1.0, 1.0, "tuned", "-")
