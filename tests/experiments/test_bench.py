"""The benchmarks' machinery, and every benchmark at its tiniest."""

import json

import pytest

from configs import bench as bench_config
from experiments import bench, bench_models, bench_record, bench_steps
from experiments.bench_anatomy import anatomy
from tests.report import synthetic

# Whole runs, or several engines of processes: tested by themselves.
SLOW = {"stall", *(n for n in bench.BENCHMARKS if n.startswith("split_"))}


def _quick(*only):
  config = bench_config.get_config()
  config.quick = True
  config.only = ",".join(only)
  return config


def test_statistics_are_derived_from_samples():
  found = bench_record.stat([1.0, 2.0, 3.0, 100.0, 2.0])
  assert (found.median, found.n) == (2.0, 5)
  assert found.low <= found.median <= found.high
  assert found == bench_record.stat([1.0, 2.0, 3.0, 100.0, 2.0])
  assert bench_record.paired([2.0, 3.0], [1.0, 2.0]) == [2.0, 1.5]
  with pytest.raises(ValueError, match="at least 1"):
    bench_record.stat([])


@pytest.mark.parametrize(
  ("measured", "at_most", "met"),
  [(1.0, True, True), (3.0, True, False), (1.0, False, False),
   (3.0, False, True), (None, True, None)],
)  # fmt: skip
def test_targets_know_whether_they_are_met(measured, at_most, met):
  target = bench_record.Target("x", measured, 2.0, at_most=at_most)
  assert target.met is met
  rows = bench_record.target_rows([bench_record.Result("b", [], {}, [target])])
  assert rows[0]["met"] == {True: "yes", False: "NO", None: "not measured"}[met]


def test_tables_take_the_columns_of_all_rows():
  lines = bench_record.table([{"a": 1, "b": None}, {"a": 2.5, "c": "x"}])
  assert [line.split() for line in lines.splitlines()] == [
    ["|", "a", "|", "b", "|", "c", "|"],
    ["|", "---", "|", "-", "|", "-", "|"],
    ["|", "1", "|", "-", "|", "-", "|"],
    ["|", "2.5", "|", "-", "|", "x", "|"],
  ]


def test_interleaved_calls_take_turns():
  order = []
  variants = {name: lambda n=name: order.append(n) for name in "ab"}
  found = bench_models.interleaved(variants, 4)
  assert [len(found[name]) for name in "ab"] == [4, 4]
  pairs = [order[i : i + 2] for i in range(0, len(order), 2)]
  assert all(sorted(pair) == ["a", "b"] for pair in pairs)


def test_a_stopwatch_sums_what_it_watches():
  class Thing:
    def work(self):
      return 3

  thing, watch = Thing(), bench_steps.Stopwatch()
  with watch.watching((thing, "work", "w")):
    assert thing.work() + thing.work() == 6
  spent = dict(watch.spent)
  thing.work()
  assert watch.spent == spent
  assert set(spent) == {"w"}


@pytest.mark.parametrize(("prefill_steps", "rest"), [(0, 4.0), (1, 3.0)])
def test_a_stall_beside_its_prefill_and_its_copy(prefill_steps, rest):
  events = synthetic.recovered()
  if prefill_steps:  # the step in which request 1 goes on carries a prompt
    events = synthetic.edited(events, "step", 4, bucket=16)
  bytes_per_s = 1000 / synthetic.STEP_S  # the copy's floor is one step
  found = anatomy(events, synthetic.twin(), synthetic.recovered(), bytes_per_s)
  assert found.verdict == "true"
  # Seven steps without a token of request 1, one of them usual.
  assert found.stall_steps == pytest.approx(6.0)
  assert found.rest_steps == pytest.approx(rest)
  assert found.copy_rate == pytest.approx(500 / synthetic.STEP_S / 1e9)
  assert found.speedup == pytest.approx(1.0)
  assert found.floor_speedup == pytest.approx(6.0)  # at least a usual gap


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"only": "stalls"}, "unknown benchmark 'stalls'; choices: plan"),
    ({"only_models": "huge"}, "unknown model 'huge'; choices: tiny"),
  ],
)
def test_unknown_names_are_one_clear_error(tmp_path, changes, message):
  config = _quick()
  config.update(changes)
  with pytest.raises(ValueError, match=message):
    bench.run(config, tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "--config is missing; there is configs/bench.py"),
    (["--size=3"], "Unknown command line flag"),
    (["more"], "'more' is neither a flag nor a value of one"),
  ],
)
def test_a_wrong_command_is_refused(capsys, argv, message):
  assert bench.main(["bench", *argv]) == 2
  assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Every benchmark that runs in this process, at its tiniest."""
  folder = tmp_path_factory.mktemp("bench")
  names = [name for name in bench.BENCHMARKS if name not in SLOW]
  bench.run(_quick(*names), folder)
  return folder


def _record(folder, name):
  return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(
  "name", [n for n in bench.BENCHMARKS if n not in SLOW]
)
def test_every_benchmark_leaves_samples_and_provenance(workdir, name):
  record = _record(workdir, name)
  assert record["rows"]
  assert record["provenance"]["config"]["quick"] is True
  for key, samples in record["samples"].items():
    assert all(isinstance(x, float) for x in samples), key
    if samples:
      assert record["statistics"][key]["n"] == len(samples)
  for target in record["targets"]:
    assert target["met"] in (True, False, None)


def test_the_summary_names_every_target(workdir):
  text = (workdir / "bench.md").read_text()
  for name in bench.BENCHMARKS:
    if name not in SLOW:
      assert f"\n## {name}\n" in text
  assert text.count("| checkpoint ") == 2  # peer and host
  assert "| benchmark " in text


def test_checkpointing_is_measured_in_pairs(workdir):
  samples = _record(workdir, "checkpoint")["samples"]
  for mode in ("peer", "host"):
    on, off = (samples[f"tiny/{mode}/{x}"] for x in ("on", "off"))
    assert len(on) == len(off) == 2
    assert min(samples[f"tiny/{mode}/bytes"]) > 0  # it did stream


def test_the_cache_is_neither_copied_nor_reallocated(workdir):
  rows = _record(workdir, "cache")["rows"]
  assert {row["commit copied bytes"] for row in rows} == {0}
  assert len({row["step temp bytes"] for row in rows}) == 1
  assert rows[0]["cache MB a rank"] < rows[1]["cache MB a rank"]


def test_a_step_is_taken_apart_into_its_parts(workdir):
  samples = _record(workdir, "steps")["samples"]
  parts = {key.split("/")[1]: values for key, values in samples.items()}
  total = parts.pop("total")
  assert {"pack", "dispatch", "wait", "commit", "history"} <= set(parts)
  for i, seconds in enumerate(total):
    assert seconds == pytest.approx(sum(p[i] for p in parts.values()))


def test_every_policy_is_asked_for_a_plan(workdir):
  from resilient_moe.recovery import policy_names

  rows = {row["policy"]: row for row in _record(workdir, "plan")["rows"]}
  assert sorted(rows) == policy_names()
  assert "infeasible" not in rows["spare"]["answer"]


def test_all_meshes_are_made_ready(workdir):
  (row,) = _record(workdir, "ready")["rows"]
  assert row["meshes"] == 2
  assert row["took s"] > 0
  assert row["stored MB"] > 0


@pytest.mark.slow
def test_a_stall_is_measured_beside_the_restart(tmp_path):
  bench.run(_quick("stall"), tmp_path)
  record = _record(tmp_path, "stall")
  rows = {row["policy"]: row for row in record["rows"]}
  assert set(rows) == {"restart_cached", "kv_restore"}
  assert {row["verdict"] for row in rows.values()} == {"true"}
  assert rows["kv_restore"]["speedup"] > 0
  assert "RestartInstance" in rows["restart_cached"]["by action (steps)"]
  assert "restart_cached's stages: spawn" in record["notes"][0]

