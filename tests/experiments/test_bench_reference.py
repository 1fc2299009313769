"""The benchmark against `transformers`, on a tiny model."""

import json

import numpy as np
import pytest

from configs import bench_reference as config_file
from experiments import bench_reference
from experiments.bench_reference_sides import Ours
from resilient_moe.model.config import ModelConfig, StepOptions

TORCH = "the reference needs torch and transformers (extra `test`)"


def _config(**changes):
  config = config_file.get_config()
  config.model.update(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=32,
  )
  config.update(
    batches="2",
    prefills="12",
    context=8,
    block_steps=2,
    chunk=8,
    prefill_rows=2,
    pairs=2,
    tries=1,
    experts_implementations="eager",
    scaling_experts="4",
    scaling_rows=2,
    scaling_chunk=8,
    targets={"decode, batch 2": 1e9, "prefill, 12 tokens": 0.0},
  )
  config.update(changes)
  return config


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_sides_choose_the_same_tokens(tmp_path, capsys):
  pytest.importorskip("torch", reason=TORCH)
  pytest.importorskip("transformers", reason=TORCH)
  result = bench_reference.run(_config(), tmp_path)
  assert [row["case"] for row in result.rows] == [
    "decode, batch 2",
    "prefill, 12 tokens",
  ]
  assert [row["tokens alike"] for row in result.rows] == [1.0, 1.0]
  assert result.rows[0]["reference's settings"].startswith("eager, ")
  assert [target.met for target in result.targets] == [False, True]
  kept = json.loads((tmp_path / "bench_reference.json").read_text())
  assert len(kept["samples"]["decode, batch 2/ours"]) == 2
  assert {"held 4/decode", "held 4/chunk"} <= set(kept["samples"])
  assert "decode, batch 2" in (tmp_path / "bench_reference.md").read_text()
  assert "times" in capsys.readouterr().out


def test_our_side_prefills_in_chunks_and_decodes_on():
  config = ModelConfig(
    vocab_size=64, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1,
    head_dim=16, n_experts=4, top_k=2, expert_width=16,
  )  # fmt: skip
  params = bench_reference._random(config)
  options = StepOptions(rows=2, max_len=16, chunk=8)
  prompt = np.random.default_rng(0).integers(0, 64, 12)
  side = Ours(config, params, options)
  token = side.prefill(1, prompt)
  # The prompt's last token decoded gives what its prefill gave.
  side.prefill(0, prompt[:-1])
  side.prefill(1, prompt[:-1])
  again = side.decode(np.array([prompt[-1], prompt[-1]]), 11)
  assert again.tolist() == [token, token]
  masked = np.array([True, True, False, False])
  side.mask(masked)
  assert side.decode(np.array([3, 5]), 12).shape == (2,)


def test_reference_is_taken_at_its_fastest(monkeypatch):
  spent = {"slow": 3.0, "fast": 1.0, "never": 9.0, "batched_mm": 0.5}
  clock = [0.0]

  class Side:
    def __init__(self, model, experts, cache):
      self.experts = experts

  class Model:
    chosen = ""

    def set_experts_implementation(self, name):
      self.chosen = name

  def work(side):
    def call():
      clock[0] += spent[side.experts]

    return call

  monkeypatch.setattr(bench_reference, "Theirs", Side)
  monkeypatch.setattr(
    bench_reference.time, "perf_counter", lambda: clock[0]
  )
  settings = _config(
    experts_implementations="slow,fast,never,batched_mm", caches="dynamic",
    tries=2, batched_rows=4,
  )  # fmt: skip
  model = Model()
  side, name = bench_reference._fastest(settings, model, 5, work)
  assert (side.experts, name) == ("fast", "fast, dynamic cache")
  assert model.chosen == "fast"
  assert clock[0] == 3.0 * 2 + 1.0 * 2 + 9.0  # hopeless ones run once
  # What copies the weights of each row's experts is for few rows only.
  side, _ = bench_reference._fastest(settings, model, 4, work)
  assert side.experts == "batched_mm"


@pytest.mark.parametrize("value", ["0", "a", "1,-2"])
def test_bad_sizes_are_named(value, tmp_path):
  with pytest.raises(ValueError, match="batches=.*integers from 1"):
    bench_reference.run(_config(batches=value), tmp_path / "out")
  assert not (tmp_path / "out").exists()
