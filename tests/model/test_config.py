import dataclasses

import pytest

from resilient_moe.model import ModelConfig, StepOptions

MLA = {
  "attention": "mla", "kv_rank": 8, "nope_dim": 4, "rope_dim": 2,
  "value_dim": 4,
}  # fmt: skip
BAD_CONFIGS = [
  ({"n_layers": 0}, "n_layers=0: at least 1"),
  ({"shared_width": -1}, "shared_width=-1: at least 0"),
  ({"top_k": 9, "n_experts": 8}, "top_k=9: at most n_experts=8"),
  ({"n_heads": 3, "n_kv_heads": 2}, "n_heads=3: a multiple of n_kv_heads=2"),
  ({"head_dim": 5}, "head_dim=5: even"),
  ({"dense_layers": 9}, "dense_layers=9: at most n_layers=4"),
  ({"dense_layers": 1}, "dense_width=0: at least 1"),
  ({"router": "hash"}, "router='hash': choose one of softmax_topk, sigmoid"),
  ({"dtype": "int8"}, "dtype='int8': choose one of float32, bfloat16"),
  ({"norm_eps": 0.0}, "norm_eps=0.0: finite and above 0"),
  ({"qkv_clip": float("nan")}, "qkv_clip=nan: finite and 0 or more"),
  ({"attention": "mla"}, "kv_rank=0: at least 1 with attention='mla'"),
  ({"kv_rank": 4}, "kv_rank=4: 0 with attention='gqa'"),
  ({**MLA, "rope_dim": 3}, "rope_dim=3: even"),
  ({**MLA, "qk_norm": "head"}, "qk_norm='head', .* 'none' and 0 with att"),
  ({"rope_scaling": "ntk"}, "rope_scaling='ntk': choose one of none, linear"),
  ({"rope_scaling": "yarn"}, "rope_length=0: at least 1 with rope_scaling='y"),
  ({"rope_factor": 2.0}, "rope_factor=2.0: 1 with rope_scaling='none'"),
  ({"rope_low": 4.0}, "rope_low=4.0: below rope_high=4.0"),
  ({"expert_groups": 3}, "expert_groups=3: a divisor of n_experts=16"),
  ({"expert_groups": 4, "top_groups": 5}, "top_groups=5: at most expert_gr"),
  ({"expert_groups": 16}, "top_k=2: at most n_experts=1 in top_groups=1"),
  (
    {"expert_groups": 16, "top_groups": 2, "group_score": "top2"},
    "expert_groups=16: groups of at least 2 experts with group_score='top2'",
  ),
  (
    {"router": "topk_softmax", "correction_bias": True},
    "router='topk_softmax': with expert_groups=1 and no correction_bias",
  ),
  ({"windows": (4,)}, r"windows=\(4,\): one a layer, n_layers=4"),
  ({"windows": (4, 0, 0, -1)}, "windows=.*: at least 0, which means all"),
  ({"dense_at": (4,)}, r"dense_at=\(4,\): ascending layers from dense_la"),
  ({"dense_at": (2, 1)}, r"dense_at=\(2, 1\): ascending"),
  ({"dense_at": (1,)}, "dense_width=0: at least 1"),
  ({"dense_layers": 4, "dense_width": 8}, "at least one of n_layers=4 has ex"),
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


def test_dense_layers_may_stand_anywhere():
  config = ModelConfig(n_layers=5, dense_at=[0, 1, 3], dense_width=8)
  assert (config.dense_layers, config.dense_at) == (2, (3,))  # one way to say
  assert config.groups() == (
    ("dense", 2), ("moe", 1), ("dense", 1), ("moe", 1),
  )  # fmt: skip
  assert config.moe_layers == 2
  assert [config.is_dense(i) for i in range(2, 5)] == [False, True, False]


@pytest.mark.parametrize("max_len", [1, 63, 64, 65, 500])
def test_a_slot_has_whole_blocks_and_room_for_a_chunk(max_len):
  options = StepOptions(max_len=max_len, chunk=20, kv_block=16)
  assert options.cache_len % 16 == 0
  assert 0 <= options.cache_len - (max_len + 20) < 16
