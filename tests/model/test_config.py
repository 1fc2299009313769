import dataclasses

import pytest

from resilient_moe.model import ModelConfig, StepOptions

BAD_CONFIGS = [
  ({"n_layers": 0}, "n_layers=0: at least 1"),
  ({"shared_width": -1}, "shared_width=-1: at least 0"),
  ({"top_k": 9, "n_experts": 8}, "top_k=9: at most n_experts=8"),
  ({"n_heads": 3, "n_kv_heads": 2}, "n_heads=3: a multiple of n_kv_heads=2"),
  ({"head_dim": 5}, "head_dim=5: even"),
  ({"dense_layers": 9}, "dense_layers=9: at most n_layers=4"),
  ({"dense_layers": 1}, "dense_width=0: at least 1"),
  ({"router": "hash"}, "router='hash': choose one of softmax_topk"),
]
BAD_OPTIONS = [
  ({"rows": 0}, "rows=0: at least 1"),
  ({"chunk": 0}, "chunk=0: at least 1"),
  ({"row_block": 1}, "row_block=1: 0 .off. or 2 to 32"),
  ({"row_block": 33}, "row_block=33"),
  ({"dispatch": "pigeon"}, "dispatch='pigeon': choose one of all_to_all, all"),
  ({"experts": "dense"}, "experts='dense': choose one of blocks, static"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_bad_config_is_one_clear_error(fields, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig(**fields)


@pytest.mark.parametrize(("fields", "message"), BAD_OPTIONS)
def test_bad_options_are_one_clear_error(fields, message):
  with pytest.raises(ValueError, match=message):
    StepOptions(**fields)


def test_groups_are_runs_of_equal_layers():
  config = ModelConfig(n_layers=5, dense_layers=2, dense_width=8)
  assert config.groups() == (("dense", 2), ("moe", 3))
  assert dataclasses.replace(config, dense_layers=0).groups() == (("moe", 5),)


@pytest.mark.parametrize("max_len", [1, 63, 64, 65, 500])
def test_a_slot_has_whole_blocks_and_room_for_a_chunk(max_len):
  options = StepOptions(max_len=max_len, chunk=20, kv_block=16)
  assert options.cache_len % 16 == 0
  assert 0 <= options.cache_len - (max_len + 20) < 16
