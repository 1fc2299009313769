"""The benchmarks of the disaggregated deployment, at their tiniest."""

import hashlib
import json
import shutil

import pytest

from configs import bench as bench_config
from experiments import bench, bench_models, bench_split
from experiments import bench_split_checkpoint as checkpoint
from experiments import bench_split_pingpong as pingpong
from experiments import bench_split_process_throughput as processes
from experiments import bench_split_restore as restore
from experiments import bench_split_stall as stall
from experiments import bench_split_throughput as throughput
from resilient_moe.model.config import ModelConfig
from resilient_moe.runtime.process import supervise
from tests.report import synthetic


def _settings(**changes):
  config = bench_config.get_config()
  config.update(changes)
  return bench_models.read(config)


def _run(folder, name):
  config = bench_config.get_config()
  config.update(quick=True, only=name)
  bench.run(config, folder)
  return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """Where programs of like engines are kept."""
  return tmp_path_factory.mktemp("stores")


@pytest.fixture
def _compile_once(stores, monkeypatch):
  """Engines of processes find what one of the same shape has compiled."""
  real = supervise.assemble

  def assemble(case, plans, fresh, scratch, recorder):
    about = repr((plans.shape, case.attention, case.ranks))
    store = stores / hashlib.sha1(about.encode()).hexdigest()[:12]
    if store.is_dir():
      shutil.copytree(store, scratch / "executables")
    backend = real(case, plans, fresh, scratch, recorder)
    shutil.copytree(scratch / "executables", store, dirs_exist_ok=True)
    return backend

  monkeypatch.setattr(supervise, "assemble", assemble)


def test_checkpoint_and_exchange_bytes_follow_the_papers_formula():
  mixtral = ModelConfig(
    n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128,
    n_experts=8, top_k=2, expert_width=14336,
  )  # fmt: skip
  assert checkpoint.formula(mixtral) == 0.125
  small = ModelConfig(**_settings().split.shape)
  assert checkpoint.formula(small) == 0.125
  assert checkpoint.formula(ModelConfig()) == 0.25  # the shipped one's shape
  ratio = lambda c: (c.n_heads // c.n_kv_heads, c.expert_width / c.d_model)
  assert ratio(small) == ratio(mixtral)


def test_bytes_are_compared_with_the_formula():
  row, off = checkpoint._bytes(
    "m", ModelConfig(), False, checkpoint.Bytes(kv=26, exchanged=100)
  )
  assert off == pytest.approx(4.0)
  assert row["KV/exchanged %"] == pytest.approx(26.0)


def test_inner_time_counts_once():
  watch = bench_split.Inner()
  inner = watch.timed("inner", lambda: None)
  outer = watch.timed("outer", lambda: [inner() for _ in range(3)])
  outer()
  assert watch.calls == {"inner": 3, "outer": 1}
  assert all(seconds >= 0 for seconds in watch.spent.values())
  assert set(watch.spent) == {"inner", "outer"}


def test_the_deployments_have_as_many_rows():
  settings = _settings()
  for model in settings.apart().values():
    total = bench_split.same_rows(settings, model)
    for ranks in (settings.split.attention, *settings.split.processes):
      assert total % ranks == 0
  assert list(settings.apart()) == ["shipped"]


def test_parts_stand_beside_their_total():
  parts = {throughput.TOTAL: [2e-3, 2e-3], "commit": [5e-4, 5e-4]}
  total, commit = throughput.part_rows("m", "apart", parts, {"commit": 2}, 9.0)
  assert total["tokens/s"] == 9.0
  assert (commit["%"], commit["us a call"]) == (25, pytest.approx(250))
  assert commit["tokens/s"] is None


def test_ratios_are_of_neighbouring_blocks():
  found = {
    pingpong.WHOLE: [1.0, 2.0], pingpong.PINGPONG: [2.0, 4.0],
    pingpong.IN_TURN: [1.0, 2.0],
  }  # fmt: skip
  row = pingpong.row(found)
  assert row["whole / ping-pong"] == 0.5
  assert row["whole / in turn"] == 1.0
  found = {
    restore.RESTORED: [1e-3, 2e-3], restore.REPLAYED: [1.0, 2.0],
    restore.PREFILLED: [2e-3, 4e-3],
  }  # fmt: skip
  row = restore.row("m", 64, found, 3000)
  assert row["replayed / restored"] == 1000.0
  assert row["prefilled / restored"] == 2.0
  assert row["MB/s"] == pytest.approx(2.0)


def test_ways_take_turns_after_one_that_warms_up():
  order = []
  ways = {name: lambda n, name=name: order.append(name) for name in "ab"}
  found = pingpong.interleaved(ways, 2, 4)
  assert [len(found[name]) for name in "ab"] == [2, 2]
  assert order == ["a", "b", "b", "a", "a", "b"]


def test_the_comparison_is_disaggregated():
  chosen = stall.comparison(_settings())
  assert (chosen.deployment, chosen.runtime) == ("disaggregated", "process")
  assert set(chosen.scenarios) == {stall.EW_LOST, stall.AW_LOST}
  assert chosen.attention < chosen.ranks


def test_waits_count_from_the_detection():
  events, twin = synthetic.recovered(), synthetic.twin()
  found = stall.waits(events, twin, events)
  (fault,) = [e for e in events if e["event"] == "fault"]
  failure = next(e for e in events if e["event"] == "failure")
  assert found.detect_s is None or found.detect_s >= 0
  assert failure["t"] >= fault["t"]
  assert found.affected_s
  assert min(found.affected_s) > 0
  assert found.worst_steps <= max(found.affected_s) / found.step_s
  assert found.speedup == pytest.approx(1.0)


def test_a_run_that_does_not_check_reaches_nothing():
  good = stall.Waits("true", 0.01, 0.0, (0.02, 0.03), 0, 0.01, (2.0,), 0.02,
                     60.0, {})  # fmt: skip
  bad = stall.dataclasses.replace(good, verdict="false")
  assert good.worst_steps == pytest.approx(2.0)
  assert bad.worst_steps is None
  result = stall.result({stall.AW_LOST: [good, good]})
  met = {target.what: target.met for target in result.targets}
  assert list(met.values()) == [True, True, True]
  assert stall.row(stall.EW_LOST, [bad])["verdict"] == "INVALID"


def test_a_round_is_taken_apart(tmp_path):
  record = _run(tmp_path, "split_throughput")
  parts = {row["part"] for row in record["rows"] if row["experts"] == "apart"}
  assert {"attention programs", "experts programs", "grouping"} <= parts
  for key in ("apart", "together"):
    rates = record["samples"][f"tiny/{key}"]
    assert len(rates) == 2
    assert min(rates) > 0


@pytest.mark.slow
def test_ping_pong_is_measured(tmp_path):
  (row,) = _run(tmp_path, "split_pingpong")["rows"]
  assert row["whole / ping-pong"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("_compile_once")
def test_processes_are_measured_side_by_side(tmp_path):
  rows = _run(tmp_path, "split_process_throughput")["rows"]
  assert [row["experts"] for row in rows] == [processes.APART, "2 together"]
  assert rows[0]["waits for experts ms"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("_compile_once")
def test_what_goes_to_the_store_agrees_with_the_formula(tmp_path):
  rows = _run(tmp_path, "split_checkpoint")["rows"]
  off = [row["off %"] for row in rows if row.get("deduplication") is False]
  assert off == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_compile_once")
def test_a_request_is_restored_and_run_again(tmp_path):
  (row,) = _run(tmp_path, "split_restore")["rows"]
  assert row["tokens"] == 16
  assert row["replayed / restored"] > 0
