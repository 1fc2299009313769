"""The comparison in virtual time, and the calibration of its timing."""

import json
import pathlib

import jax
import pytest

import resilient_moe as rm
from experiments import calibrate, run, simulated
from experiments.simulated import SimOptions, run_simulated, simulated_case
from resilient_moe.model import ModelConfig
from resilient_moe.model.params import init_params
from resilient_moe.runtime.case import Case, RunFailed
from tests.experiments.run_fake import config_file
from tests.sim.still import Fixed

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
MACHINE = Fixed(
  step=0.012, turn_s=0.0005, act=0.004, plan=0.002, detect=0.03, struck=0.5,
  lag=0.03, ready=0.25, begin=2.5,
)  # fmt: skip


def _launch(tmp_path: pathlib.Path, *flags: str, **changes) -> int:
  file = tmp_path / "config.py"
  if not file.exists():
    config_file(tmp_path, **changes)
  return run.launch(
    ["run.py", f"--config={file}", f"--workdir={tmp_path}/out", *flags]
  )


def _fitted(tmp_path: pathlib.Path, *flags: str) -> int:
  return calibrate.main(
    ["calibrate.py", f"--runs={tmp_path}/out", f"--out={tmp_path}/fit.json",
     *flags]
  )  # fmt: skip


def test_a_simulation_leaves_what_other_runs_leave(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert _launch(tmp_path, runtime="simulated") == 0
  folder = tmp_path / "out" / "rank_lost_decode" / "kv_restore" / "seed0"
  assert {f.name for f in folder.iterdir()} == {
    "case.json", "history.jsonl", "outputs.jsonl", "verdict.json",
  }  # fmt: skip
  assert json.loads((folder / "verdict.json").read_text())["overall"] == "true"
  outputs = (folder / "outputs.jsonl").read_text().splitlines()
  assert [len(json.loads(o)["output_tokens"]) for o in outputs] == [8] * 4
  table = (tmp_path / "out" / "table.md").read_text()
  assert "rank_lost_decode (simulated, collocated)" in table
  assert "Simulated, in virtual time; calibrated on" in table
  origin = json.loads((tmp_path / "out" / "provenance.json").read_text())
  assert origin["device_kind"] == "none: 4 simulated ranks in virtual time"
  assert "calibrated on" in origin["timing"]
  capsys.readouterr()
  assert _launch(tmp_path) == 0
  assert capsys.readouterr().out.count("done before") == 3


def test_hardware_may_stand_in_for_a_calibration(
  tmp_path: pathlib.Path,
) -> None:
  sim = {"device": "h100", "model": "mixtral-8x7b"}
  assert _launch(tmp_path, runtime="simulated", sim=sim) == 0
  table = (tmp_path / "out" / "table.md").read_text()
  assert "not calibrated: roofline of mixtral-8x7b on h100" in table


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--config.sim.calibration=nowhere.json"], "calibration 'nowhere.json'"),
    (["--config.sim.device=h100"], "needs both"),
    (["--config.sim.detect_s=-1.0"], "0 seconds or more"),
    (["--config.sim.speed=2"], "config.sim.speed: unknown key; choices: "),
  ],
)
def test_what_can_not_be_simulated_is_refused_before_anything_is_written(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], flags, said
) -> None:
  config = {"runtime": "simulated", "sim": {"calibration": "emulated"}}
  assert _launch(tmp_path, *flags, **config) == run.BAD_INPUT
  assert said in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


SIZES = {
  "vocab_size": 96, "n_layers": 3, "d_model": 32, "n_heads": 4,
  "n_kv_heads": 2, "head_dim": 8, "n_experts": 8, "top_k": 3,
  "expert_width": 24, "dense_layers": 1, "dense_width": 40,
}  # fmt: skip


def _case(tmp_path: pathlib.Path, **changes) -> Case:
  (tmp_path / "config.json").write_text(json.dumps(SIZES))
  return Case(**{
    "checkpoint": str(tmp_path), "policy": "kv_restore", "policy_kwargs": {},
    "scenario": "rank_lost_decode", "seed": 7, "runtime": "simulated",
    "deployment": "collocated", "ranks": 4, "requests": (), "faults": (),
    "options": {"rows": 2, "max_len": 40, "chunk": 8, "kv_block": 16},
    **changes,
  })  # fmt: skip


@pytest.mark.parametrize("by_step", [False, True])
def test_a_case_is_passed_on_whole(tmp_path: pathlib.Path, by_step) -> None:
  case = _case(tmp_path, wait_ready=not by_step, sim={"by_step": by_step})
  got = simulated_case(case)
  assert (got.by_step, got.wait_ready, got.seed) == (by_step, not by_step, 7)
  assert (got.rows, got.chunk, got.max_len, got.cache_len) == (2, 8, 40, 48)
  assert got.model.token_kv_bytes == 3 * 2 * 2 * 8 * 4  # keys and values
  assert got.model.embedding_bytes == 32 * 4
  assert got.model.moe_layers == 2
  assert got.model.expert_bytes == 2 * 3 * 32 * 24 * 4


def test_a_model_of_another_size_brings_its_own_bytes(
  tmp_path: pathlib.Path,
) -> None:
  sim = {"device": "h100", "model": "mixtral-8x7b", "detect_s": 1.5}
  got = simulated_case(_case(tmp_path, sim=sim)).model
  assert got.vocab_size == 96
  assert (got.n_experts, got.top_k, got.moe_layers) == (8, 2, 32)
  # Of bfloat16; 46.7 of its 8 * 7 billion parameters are there.
  assert got.token_kv_bytes == 32 * 2 * 8 * 128 * 2
  assert got.expert_bytes == 32 * 3 * 4096 * 14336 * 2
  whole = (got.dense_bytes + 8 * got.expert_bytes) / 2
  assert whole == pytest.approx(46.7e9, rel=0.01)
  assert SimOptions(**sim).timing().detect_s("rank_lost", 0.3) == 1.5


def test_a_published_checkpoint_has_the_bytes_of_its_type(
  tmp_path: pathlib.Path,
) -> None:
  config = ModelConfig(vocab_size=16, d_model=16, n_layers=1, n_experts=2)
  params = init_params(config, jax.random.key(0))
  folder = tmp_path / "published"
  rm.save_huggingface(folder, config, params, "mixtral")
  whole, half = (
    simulated.model_facts(str(folder), {}, dtype=dtype)
    for dtype in ("float32", "bfloat16")
  )
  for name in ("expert_bytes", "token_kv_bytes", "embedding_bytes"):
    assert getattr(whole, name) == 2 * getattr(half, name) > 0, name


def test_a_run_that_nobody_can_recover_leaves_no_history(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  def fail(self) -> None:
    raise simulated.Unrecoverable("nobody is left")

  monkeypatch.setattr(simulated.Run, "run", fail)
  with pytest.raises(RunFailed, match="nobody is left"):
    run_simulated(_case(tmp_path), tmp_path / "out")
  assert not (tmp_path / "out" / "history.jsonl").exists()


def test_a_detector_can_be_slower_than_the_calibrated(
  tmp_path: pathlib.Path,
) -> None:
  assert SimOptions(detect_s=0.5).timing().detect_s("rank_lost", 0.3) == 0.5


def test_calibration_finds_the_machine_it_was_shown(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
  monkeypatch.setattr(SimOptions, "timing", lambda self: MACHINE)
  monkeypatch.setattr(run, "run_case", run_simulated)
  monkeypatch.setattr(calibrate, "DRAWS", 2)
  policies = "restart_cached,mesh_shrink,kv_restore"
  flags = "--config.seeds=0,1,2", f"--config.policies={policies}"
  assert _launch(tmp_path, *flags) == 0
  capsys.readouterr()
  assert _fitted(tmp_path, "--holdout=1") == 0
  out = capsys.readouterr().out
  assert "calibrated on 8 simulated runs" in out
  about = json.loads((tmp_path / "fit.json").read_text())["about"]
  assert about["held_out_error"]["affected_stall_s"] < 0.1
  assert about["held_out_error"]["resume_s"] < 0.1
  assert "rank_lost_decode/mesh_shrink/seed1: affected_stall_s" in out
  assert _fitted(tmp_path, "--holdout=kv_restore") == 0
  assert "over 3 held-out runs" in capsys.readouterr().out
  assert _fitted(tmp_path, "--cross=policy") == 0
  out = capsys.readouterr().out
  assert "calibrated on 12 simulated runs" in out
  assert "% in seconds (p90" in out
  assert "% in steps (p90" in out
  assert "another seed says it with" in out
  assert "over 9 held-out runs" in out
  assert _fitted(tmp_path, "--cross=rank") == calibrate.BAD_INPUT
  assert _fitted(tmp_path, "--holdout=retry") == calibrate.BAD_INPUT


def test_calibration_needs_runs_to_fit_and_runs_to_hold_out(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
  assert _fitted(tmp_path) == calibrate.BAD_INPUT
  assert "No such file" in capsys.readouterr().err
  monkeypatch.setattr(run, "run_case", run_simulated)
  monkeypatch.setattr(SimOptions, "timing", lambda self: MACHINE)
  assert _launch(tmp_path) == 0
  capsys.readouterr()
  assert _fitted(tmp_path) == calibrate.BAD_INPUT
  assert "at least one run must be held out" in capsys.readouterr().err
  assert not (tmp_path / "fit.json").exists()
