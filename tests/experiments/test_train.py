"""Training lowers the loss, resumes to the same bits, and exports."""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from configs import train_shipped
from experiments import corpus, train, train_io, train_schedule
from resilient_moe.model import ModelConfig, load_checkpoint

TEXT = corpus.Corpus(
  train=np.tile(np.frombuffer(b"the quick brown fox; \0", np.uint8), 200),
  held_out=np.tile(np.frombuffer(b"the brown fox; \0", np.uint8), 80),
  documents=2,
  sha1="0" * 40,
)


def _config(**changes: Any) -> ml_collections.ConfigDict:
  config = train_shipped.get_config("runlocal")
  config.model.update(n_layers=1, d_model=16)
  config.phases = ((20, 4, 16), (10, 2, 32))
  config.learning_rate = 1e-2
  config.update(changes)
  return config


def _assert_same(a: Any, b: Any) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
  """A run of all its steps: (config, workdir, state)."""
  config, workdir = _config(), tmp_path_factory.mktemp("run")
  train_io.claim_workdir(config, TEXT, workdir, train_schedule.check_same_past)
  return config, workdir, train.train(config, TEXT, workdir)


def test_thirty_steps_lower_the_loss(finished) -> None:
  _, workdir, _ = finished
  lines = train_io.read_metrics(workdir / "metrics.jsonl")
  assert [m["step"] for m in lines] == [10, 20, 30]
  assert lines[-1]["bits_per_byte"] < 4.5 < lines[0]["bits_per_byte"]
  assert lines[-1]["held_out_bits_per_byte"] < 5
  assert all(m["tokens_per_s"] > 0 and m["grad_norm"] > 0 for m in lines)


def test_resume_is_exact(finished, tmp_path: pathlib.Path) -> None:
  config, workdir, state = finished
  half = train.train(config, TEXT, tmp_path, stop_at=10)
  assert int(half.step) == 10
  resumed = train.train(config, TEXT, tmp_path)
  assert int(resumed.step) == 30
  _assert_same(resumed, state)
  steps = [
    [m["step"] for m in train_io.read_metrics(d / "metrics.jsonl")]
    for d in (tmp_path, workdir)
  ]
  assert steps[0] == steps[1]


def test_the_batch_is_a_function_of_seed_and_step() -> None:
  config = _config()
  a, b = (train.batch_at(config, TEXT.train, 7) for _ in range(2))
  np.testing.assert_array_equal(a, b)
  assert a.shape == (4, 17)
  assert train.batch_at(config, TEXT.train, 20).shape == (2, 33)
  assert (a != train.batch_at(config, TEXT.train, 8)).any()
  config.seed = 1
  assert (a != train.batch_at(config, TEXT.train, 7)).any()


def test_windows_begin_as_prompts_do() -> None:
  assert (train.batch_at(_config(), TEXT.train, 3)[:, 0] == 0).all()


def test_the_balance_loss_is_one_when_even_and_grows_when_not() -> None:
  even = np.full((2, 4), 0.25, np.float32)
  skewed = np.array([[1, 0, 0, 0], [0.25] * 4], np.float32)

  def loss(p: np.ndarray) -> jax.Array:
    return train.balance_loss({"expert_load": p, "router_probs_mean": p})

  assert float(loss(even)) == pytest.approx(1)
  assert float(loss(skewed)) == pytest.approx((4 + 1) / 2)


def test_the_balance_loss_moves_probability_to_idle_experts() -> None:
  load = np.array([[0.7, 0.1, 0.1, 0.1]], np.float32)
  gradient = jax.grad(
    lambda p: train.balance_loss({"expert_load": load, "router_probs_mean": p})
  )(np.full((1, 4), 0.25, np.float32))
  assert gradient[0, 0] > gradient[0, 1] > 0


def test_weight_decay_leaves_the_norms_alone() -> None:
  state, _ = train.make_step(_config(), ModelConfig(**_config().model))
  decayed = train._decayed(state.params)
  names = {
    jax.tree_util.keystr(path): used
    for path, used in jax.tree_util.tree_leaves_with_path(decayed)
  }
  assert {n for n, used in names.items() if not used} == {
    n for n in names if "norm" in n
  }


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
  config = _config(warmup_steps=5, decay_steps=10)
  rate = train_schedule.learning_rate(config)
  rates = [float(rate(i)) for i in range(31)]
  assert rates[0] == 0
  assert rates[5:20] == pytest.approx([1e-2] * 15)
  assert rates[20:] == sorted(rates[20:], reverse=True)
  assert rates[30] == pytest.approx(1e-4)


def test_what_lies_ahead_of_a_run_can_be_changed(finished) -> None:
  _, workdir, _ = finished
  old = json.loads((workdir / "run.json").read_text())["config"]
  longer = _config(phases=((25, 4, 16), (10, 2, 32))).lock()
  train_schedule.check_same_past(longer, old, done=19)
  with pytest.raises(ValueError, match="phases changes one of the 21 steps"):
    train_schedule.check_same_past(longer, old, done=21)
  late = _config(decay_steps=5).lock()
  with pytest.raises(ValueError, match="decay_steps changes one of the 23"):
    train_schedule.check_same_past(late, old, done=23)


def test_a_run_is_claimed_again_by_its_own_config(finished) -> None:
  _, workdir, _ = finished
  before = (workdir / "run.json").read_text()
  train_io.claim_workdir(
    _config().lock(), TEXT, workdir, train_schedule.check_same_past
  )
  assert (workdir / "run.json").read_text() == before


def test_another_runs_work_directory_is_refused(finished) -> None:
  _, workdir, _ = finished
  before = (workdir / "run.json").read_text()
  with pytest.raises(ValueError, match=r"config.seed is 5, but 0"):
    train_io.claim_workdir(
      _config(seed=5), TEXT, workdir, train_schedule.check_same_past
    )
  assert (workdir / "run.json").read_text() == before


def test_a_work_directory_that_cannot_be_written_is_one_clear_error(
  tmp_path: pathlib.Path,
) -> None:
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="--workdir=.*can't be written"):
    train_io.claim_workdir(
      _config(), TEXT, tmp_path / "file" / "run", train_schedule.check_same_past
    )


def test_the_export_is_the_model_rounded_and_its_card(
  finished, tmp_path: pathlib.Path
) -> None:
  config, workdir, state = finished
  folder = tmp_path / "model"
  card = train.export(config, TEXT, workdir, folder)
  model, params = load_checkpoint(folder)
  assert model == ModelConfig(**config.model)
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype("bfloat16").astype("float32"), state.params
  )
  _assert_same(params, rounded)
  assert json.loads((folder / "card.json").read_text()) == card
  assert card["steps"] == card["total_steps"] == 30
  assert card["tokens"] == 20 * 4 * 16 + 10 * 2 * 32
  np.testing.assert_allclose(np.sum(card["load"], axis=1), 1, atol=1e-3)
  readme = (folder / "README.md").read_text()
  assert f"**{card['held_out_bits_per_byte']:.3f}**" in readme
  assert card["command"] in readme
  assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_variant_is_refused() -> None:
  with pytest.raises(ValueError, match="choose one of shipped, runlocal"):
    train_shipped.get_config("big")
