import json

import pytest

from resilient_moe.sim.shapes import MODELS, shape

# Totals that the models' own cards and papers state, billions of parameters.
TOTAL = {
  "mixtral-8x7b": 46.7,
  "qwen3-30b-a3b": 30.5,
  "qwen3-235b-a22b": 235.0,
  "olmoe-1b-7b": 6.92,
  "deepseek-v2-lite": 15.7,
  "deepseek-v3": 671.0,
  "gpt-oss-20b": 20.9,
  "gpt-oss-120b": 116.8,
}
ACTIVE = {  # likewise, of one token
  "mixtral-8x7b": 12.9,
  "qwen3-30b-a3b": 3.3,
  "qwen3-235b-a22b": 22.0,
  "olmoe-1b-7b": 1.3,
  "deepseek-v2-lite": 2.4,
  "deepseek-v3": 37.0,
  "gpt-oss-20b": 3.6,
  "gpt-oss-120b": 5.1,
}


@pytest.mark.parametrize("name", TOTAL)
def test_parameters_are_those_of_the_model_card(name):
  s = shape(name)
  assert s.params / 1e9 == pytest.approx(TOTAL[name], rel=2e-3)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_of_the_model_card(name):
  s = shape(name)
  idle = s.moe_layers * (s.n_experts - s.top_k) * s.expert_params
  # Cards count the input embeddings in or out.
  low = s.params - idle - s.head_params
  assert 0.97 * low <= ACTIVE[name] * 1e9 <= 1.03 * (low + s.head_params)


def test_bytes_by_hand():
  mixtral = shape("mixtral-8x7b")
  # Two caches of 8 heads of 128 numbers of 2 bytes in 32 layers.
  assert mixtral.token_kv_bytes == 2 * 8 * 128 * 2 * 32
  assert mixtral.expert_bytes == 3 * 4_096 * 14_336 * 2 * 32
  deepseek = shape("deepseek-v3")
  assert deepseek.token_kv_bytes == (512 + 64) * 2 * 61
  assert deepseek.expert_bytes == 3 * 7_168 * 2_048 * 58
  # A head scores over 576 numbers and sums over 512.
  assert deepseek.score_flops == 2 * 128 * (576 + 512)
  assert shape("gpt-oss-20b").expert_weight_bytes == 0.53125


def test_tarragons_checkpoint_ratio():
  assert shape("mixtral-8x7b").checkpoint_ratio == 0.125


def test_the_shipped_model_is_its_own_config(repository):
  path = repository / "resilient_moe/assets/byte_moe/config.json"
  config = json.loads(path.read_text())
  s = shape("byte_moe")
  for name, value in config.items():
    if hasattr(s, name):
      assert getattr(s, name) == value, name
  assert config["dtype"] == "float32"
  assert s.dense_weight_bytes == s.expert_weight_bytes == 4.0


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_says_where_it_is_from(name):
  s = shape(name)
  assert s.source
  assert s.windowed_layers == 0 or s.window > 0
  assert s.expert_bytes > 0
  assert s.dense_bytes > 0


def test_an_unknown_model_names_the_choices():
  with pytest.raises(ValueError, match="gpt-5.*mixtral-8x7b"):
    shape("gpt-5")
