"""Planning a fleet: arithmetic that can be done by hand, and real answers."""

import json
import tracemalloc

import jax
import pytest

from configs import plan as plan_config
from experiments import plan
from experiments.plan_failures import failures, survey
from experiments.plan_memory import (
  check_fits,
  held,
  max_context,
  max_rows,
  room_for_copies,
  short_bytes,
)
from resilient_moe import recovery
from resilient_moe.model.config import ModelConfig
from resilient_moe.model.sizes import model_size

pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
# 3 layers, 8 experts of 3 * 3 * 64 * 32 numbers of 4 bytes = 73,728 B each.
SMALL = ModelConfig(
  vocab_size=256,
  n_layers=3,
  d_model=64,
  n_heads=4,
  n_kv_heads=2,
  head_dim=16,
  n_experts=8,
  top_k=2,
  expert_width=32,
)
EXPERT_BYTES = 73_728
ROW_BYTES = 128 * 3 * 2 * 2 * 16 * 4  # 64 tokens and a chunk of 64


def _config(**changes):
  config = plan_config.get_config()
  config.update(
    model="small",
    dtype="float32",
    ranks=4,
    device_memory_gb=1e-3,
    working_gb=0.0,
    context=64,
    chunk=64,
    rows=2,
    ranks_per_host=2,
    hosts_per_rack=1,
  )
  config.update(changes)
  return config


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """The model "small", so that numbers can be checked by hand."""
  real = plan.model_of
  monkeypatch.setattr(
    plan,
    "model_of",
    lambda name, dtype: SMALL if name == "small" else real(name, dtype),
  )


def _fleet(**changes):
  return plan.fleet_of(_config(**changes))


def test_a_rank_holds_what_it_is_for():
  together, = held(_fleet(), slots=2, rows=2)
  assert together.experts == 2 * EXPERT_BYTES
  assert together.kv == 2 * ROW_BYTES
  assert together.dense == model_size(SMALL).dense_bytes
  attend, expert = held(_fleet(attention=1), slots=3, rows=2)
  assert (attend.experts, expert.dense, expert.kv) == (0, 0, 0)
  assert expert.experts == 3 * EXPERT_BYTES


def test_slots_are_those_of_the_ranks_that_are_left():
  fleet = _fleet(ranks=5)
  assert [fleet.slots(lost) for lost in (0, 1, 2)] == [2, 2, 3]
  assert _fleet(ranks=5, attention=3).slots() == 4


def test_room_is_what_just_fits():
  fleet = _fleet()
  rows, slots = max_rows(fleet, 2), room_for_copies(fleet)[0]
  assert not short_bytes(fleet, held(fleet, 2, rows))
  assert short_bytes(fleet, held(fleet, 2, rows + 1))
  assert not short_bytes(fleet, held(fleet, slots, fleet.rows))
  assert short_bytes(fleet, held(fleet, slots + 1, fleet.rows))
  longest = max_context(fleet, 2)
  assert max_rows(fleet, 2, longest) >= fleet.rows
  assert max_rows(fleet, 2, longest + 64) < fleet.rows
  # Three ranks hold the eight experts and the copies.
  assert room_for_copies(fleet)[1] == 3 * slots - 8


def test_what_does_not_fit_says_by_how_much_and_what_would():
  fleet = _fleet(device_memory_gb=4e-4, rows=1)
  with pytest.raises(ValueError, match="what would fit") as error:
    check_fits(fleet)
  text = str(error.value)
  (kind,) = held(fleet, 2, 1)
  assert f"{kind.total - 400_000:,} more than" in text
  offers = dict(
    offer.split("=")
    for offer in text.partition("what would fit: ")[2].split(" or ")
  )
  for key, value in offers.items():
    number = float(value) if "." in value else int(value)
    check_fits(_fleet(**{"device_memory_gb": 4e-4, "rows": 1, key: number}))
  assert offers["ranks"] == "8"  # one slot each


def _answers(most=4, **changes):
  fleet = _fleet(**changes)
  axes = _config().axes.to_dict()
  found = survey(fleet, axes, (2, 1), most)
  return {o.axis: o for o in found}


def test_policies_answer_for_the_fleet():
  found = _answers()
  lost = {axis: o.answers["a rank"] for axis, o in found.items()}
  assert all(a.survived == a.asked == 4 for a in lost.values())
  assert "no copy" in lost["replicas"].text
  assert "2 experts (0.000147 GB) from host" in lost["host memory"].text
  assert "from disk" in lost["disk"].text
  assert lost["masked"].text == "lossy: masks 2 of 8"
  assert "whole restart" in lost["restart"].text
  # Three slots a rank, kept for one loss; two ranks have room for six.
  assert found["host memory"].slots == 3
  host = found["host memory"].answers["a host"]
  assert host.survived == 0
  assert host.text.startswith("no: ")
  assert found["host memory"].short_bytes == 0
  assert "role switch" not in found  # collocated


def test_roles_fail_apart():
  found = _answers(attention=2)
  assert "spare" not in found
  switch = found["role switch"].answers["an expert rank"]
  assert "switches its role" in switch.text
  assert found["masked"].answers["an attention rank"].lossy == 0


def test_a_policy_that_needs_more_memory_is_marked():
  fleet = _fleet(ranks=4, rows=1)
  (kind,) = held(fleet, 2, 1)
  tight = _config(rows=1, device_memory_gb=(kind.total + 1) / 1e9)
  text = plan.report(tight)
  assert "(doesn't fit)" in text
  assert "B short" in text


def test_failures_are_of_the_kind_they_say():
  view = recovery.bare_view(8, 16, ranks_per_host=2, hosts_per_rack=2)
  kinds = failures(view, most=3)
  assert [len(f) for f in kinds.values()] == [3, 3, 3, 2]
  assert all(view.host[a] != view.host[b] for a, b in kinds["two ranks"])
  for ranks in kinds["a rack"]:
    assert len(set(view.rack[list(ranks)])) == 1
    assert len(ranks) == 4


def test_deepseek_v3_for_320_ranks_allocates_nothing(capsys):
  argv = "plan", "--config=configs/plan.py", "--config.asked=2"
  before = len(jax.live_arrays())
  tracemalloc.start()
  assert plan.main([*argv]) == 0
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(jax.live_arrays()) == before
  assert peak < 200e6  # an expert alone has 5.1 GB
  out = capsys.readouterr().out
  assert "671 B numbers" in out
  assert "4,926,848 B a token saved (71.1 times)" in out
  assert "Lost: a rack" in out


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"model": "nothing"}, "presets: mixtral-8x7b"),
    ({"ranks": 0}, "ranks=0: at least 1"),
    ({"attention": 4}, "attention=4: 0 to 3"),
    ({"losses": 4}, "losses=4: 0 to 3"),
    ({"rows": 0}, "rows=0: more than 0"),
    ({"axes": {"x": {"replicas": 1}}}, "axes.x=.*`policy`"),
  ],
)
def test_bad_input_is_one_error(changes, match):
  with pytest.raises(ValueError, match=match):
    plan.report(_config(**changes))


def test_own_checkpoint_folder_needs_its_config_alone(tmp_path):
  fields = {"vocab_size": 64, "n_layers": 2, "dtype": "float32"}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  config = plan.model_of(str(tmp_path), "bfloat16")
  assert (config.vocab_size, config.dtype) == (64, "bfloat16")
