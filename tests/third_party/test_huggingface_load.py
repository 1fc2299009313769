"""What a checkpoint may look like on disk, and one error for what it may not.

No torch: the folders are written by hand.
"""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.third_party import files
from third_party import huggingface as hf
from third_party.huggingface import quantized
from third_party.huggingface.tensor_files import INDEX, SINGLE

ALL = {
  "mixtral": files.MIXTRAL, "qwen3_moe": files.QWEN3, "olmoe": files.OLMOE,
  "deepseek_v2": files.DEEPSEEK_V2, "deepseek_v3": files.DEEPSEEK,
  "gpt_oss": files.GPT_OSS,
}  # fmt: skip
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture
def tensors(rng):
  return files.random_tensors(files.MIXTRAL, rng)


def refused(folder: pathlib.Path, *parts: str, dtype: str = "") -> None:
  """One error of one line, with all these parts in this order."""
  with pytest.raises(ValueError, match=".*".join(parts)) as caught:
    hf.Checkpoint(folder, dtype)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_used_and_every_parameter_filled(name, tmp_path, rng):
  tensors = files.random_tensors(ALL[name], rng)
  for seed, (key, x) in enumerate(tensors.items(), start=1):
    x[...] = seed  # so that what is left out shows
    assert x.size, key
  folder = files.write_folder(tmp_path, ALL[name], tensors)
  checkpoint = hf.Checkpoint(folder, "float32")
  trees = [checkpoint.dense()]
  trees += checkpoint.experts(range(checkpoint.config.n_experts)).values()
  found = [np.unique(leaf) for leaf in jax.tree.leaves(trees)]
  assert set(np.concatenate(found)) == set(range(1, len(tensors) + 1))


def test_the_stacked_experts_are_those_read_one_by_one(tmp_path, tensors):
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  _, params = hf.load_huggingface(folder)
  checkpoint = hf.Checkpoint(folder)
  for e in range(8):
    each = jax.tree.map(lambda x, e=e: x[:, e], params["experts"])
    jax.tree.map(np.testing.assert_array_equal, each, checkpoint.expert(e))
  dense = {k: v for k, v in params.items() if k != "experts"}
  jax.tree.map(np.testing.assert_array_equal, dense, checkpoint.dense())


def test_one_file_without_an_index(tmp_path, tensors):
  folder = files.write_folder(tmp_path / "a", files.MIXTRAL, tensors)
  alone = tmp_path / "b"
  alone.mkdir()
  (alone / "config.json").write_text(json.dumps(files.MIXTRAL))
  files.write_tensors(alone / SINGLE, tensors)
  trees = [hf.Checkpoint(f).dense() for f in (folder, alone)]
  jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("stored", [np.float16, files.BF16, np.float64])
def test_other_floats_become_the_dtype_that_is_asked_for(
  stored, tmp_path, tensors
):
  low = {name: x.astype(stored) for name, x in tensors.items()}
  folder = files.write_folder(tmp_path, files.MIXTRAL, low)
  for dtype in ("float32", "bfloat16"):
    config, params = hf.load_huggingface(folder, dtype)
    assert config.dtype == dtype == params["embed"].dtype
    want = low["model.embed_tokens.weight"].astype(dtype)
    np.testing.assert_array_equal(np.asarray(params["embed"]), want)


def test_both_spellings_of_rope_say_the_same(tmp_path):
  scaling = {"factor": 4.0, "original_max_position_embeddings": 32}
  new = {
    **{k: v for k, v in files.MIXTRAL.items() if k != "rope_theta"},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **scaling},
  }
  old = {**files.MIXTRAL, "rope_scaling": {"type": "yarn", **scaling}}
  configs = []
  for fields in (new, old):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    configs.append(hf.read_config(tmp_path))
  assert configs[0] == configs[1]
  assert configs[0].rope_scaling == "yarn"
  assert configs[0].rope_magnitude == pytest.approx(0.1 * np.log(4) + 1)


def test_mxfp4_is_what_the_format_says(tmp_path, rng):
  """And, where torch is, what the reference makes of it."""
  tensors = files.random_tensors(files.GPT_OSS, rng)
  e, d, f = 4, 64, 32
  plain = {}
  for i in range(2):
    for name, out, rows in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
      key = f"model.layers.{i}.mlp.experts.{name}"
      del tensors[key]
      blocks = rng.integers(0, 256, (e, out, rows // 32, 16), np.uint8)
      scales = rng.integers(110, 140, (e, out, rows // 32), np.uint8)
      tensors[key + "_blocks"], tensors[key + "_scales"] = blocks, scales
      plain[key] = blocks, scales
  fields = {**files.GPT_OSS, "quantization_config": {
    "quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"],
  }}  # fmt: skip
  folder = files.write_folder(tmp_path, fields, tensors)
  checkpoint = hf.Checkpoint(folder, "float32")
  for which in (0, 3):
    got = checkpoint.expert(which)
    for i in range(2):
      key = f"model.layers.{i}.mlp.experts.down_proj"
      np.testing.assert_array_equal(
        got["down"][i], _mxfp4_by_hand(*(x[which] for x in plain[key]))
      )
      key = f"model.layers.{i}.mlp.experts.gate_up_proj"
      turns = _mxfp4_by_hand(*(x[which] for x in plain[key]))
      np.testing.assert_array_equal(got["gate_up"][i][:, :f], turns[:, ::2])
      np.testing.assert_array_equal(got["gate_up"][i][:, f:], turns[:, 1::2])


def _mxfp4_by_hand(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """[out, G, 16], [out, G] -> [in, out], number by number."""
  magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
  out = np.zeros((blocks.shape[0], blocks.shape[1] * 32), np.float32)
  for (row, group, byte), value in np.ndenumerate(blocks):
    scale = 2.0 ** (int(scales[row, group]) - 127)
    for half, code in enumerate((value & 15, value >> 4)):
      sign = -1 if code & 8 else 1
      place = group * 32 + 2 * byte + half
      out[row, place] = sign * magnitudes[code & 7] * scale
  return out.T


def test_fp8_blocks_are_scaled_and_further_layers_left_out(tmp_path, rng):
  tensors = files.random_tensors(files.DEEPSEEK, rng)
  want = {}
  for name in list(tensors):
    if "experts" in name:
      low = tensors[name].astype(files.FP8)
      grid = -(-low.shape[0] // 4), -(-low.shape[1] // 3)
      scale = rng.uniform(0.5, 2, grid).astype(np.float32)
      tensors[name], tensors[name + "_scale_inv"] = low, scale
      rows, columns = np.indices(low.shape)
      factors = scale[rows // 4, columns // 3]
      want[name] = low.astype(np.float32) * factors
  tensors["model.layers.2.eh_proj.weight"] = np.zeros((4, 4), np.float32)
  fields = {**files.DEEPSEEK, "quantization_config": {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 3],
  }}  # fmt: skip
  folder = files.write_folder(tmp_path, fields, tensors)
  got = hf.Checkpoint(folder, "float32").expert(2)["down"][0]
  np.testing.assert_array_equal(got, want[DOWN].T)
  plain = {**fields, "quantization_config": None}
  (folder / "config.json").write_text(json.dumps(plain))
  refused(folder, "is stored as F8_E4M3; expected is one of F64, F32")
  del tensors[DOWN + "_scale_inv"]
  files.write_folder(folder, fields, tensors)
  refused(folder, re.escape(f"{DOWN} is there without {DOWN}_scale_inv"))
  tensors[DOWN + "_scale_inv"] = np.ones((1, 1), np.float32)
  files.write_folder(folder, fields, tensors)
  refused(folder, r"scale_inv is F32 \[1, 1\]; expected is F32 \[4, 3\]")


@pytest.mark.parametrize(
  ("change", "error"),
  [
    ({"architectures": ["LlamaForCausalLM"]}, "supported: MixtralFor.*GptOss"),
    ({"model_type": "llama"}, "model_type='llama'.*has 'mixtral'"),
    ({"hidden_act": "gelu"}, 'hidden_act=\'gelu\': supported: "silu"'),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"vocab_size": "64"}, "vocab_size='64': needed is an integer from 1"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"rope_theta": -1}, "rope_theta=-1: needed is a number above 0"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: choose true or"),
    ({"new_gate": 3}, "new_gate=3: this loader doesn't know the field"),
    ({"num_experts": 9}, "num_experts=9: but num_local_experts=8"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: supported"),
    ({"rope_scaling": {"type": "dynamic"}}, "'dynamic': supported: default"),
    (
      {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 1}},
      "beta_fast=1: not a part of rope_type='linear', which has: factor",
    ),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
      "one for each kind of layer",
    ),
    (
      {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
      "rope_theta=10000.0: but 500000.0 with the scaling",
    ),
    (
      {"quantization_config": {"quant_method": "awq"}},
      "quant_method='awq': choose a checkpoint that is not quantised",
    ),
    ({"torch_dtype": None}, "dtype is missing; choose float32 or bfloat16"),
    ({"torch_dtype": "float16"}, "dtype='float16': choose one of float32"),
    ({"num_experts_per_tok": 9}, "top_k=9: at most n_experts=8"),
  ],
)
def test_a_config_is_refused_with_the_field_and_the_choices(
  change, error, tmp_path
):
  (tmp_path / "config.json").write_text(
    json.dumps({**files.MIXTRAL, **change})
  )
  with pytest.raises(ValueError, match=error) as caught:
    hf.read_config(tmp_path)
  assert "config.json: " in str(caught.value)


@pytest.mark.parametrize(
  ("fields", "change", "error"),
  [
    (files.QWEN3, {"mlp_only_layers": [2]}, r"\[2\]: needed are layers from"),
    (files.QWEN3, {"use_sliding_window": True}, "sliding_window is missing"),
    (files.QWEN3, {
      "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    }, "max_window_layers=1: .*supported: null"),
    (files.QWEN3, {"norm_topk_prob": None}, "norm_topk_prob is missing"),
    (files.DEEPSEEK_V2, {"topk_method": "x"}, '"greedy", "group_limited'),
    (files.DEEPSEEK_V2, {"norm_topk_prob": True}, "True: supported: false"),
    (files.DEEPSEEK_V2, {"scoring_func": "sigmoid"}, 'supported: "softmax"'),
    (files.DEEPSEEK_V2, {
      "topk_method": "group_limited_greedy", "n_group": None,
    }, "n_group is missing"),
    (files.DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq=2: supported: 1"),
    (files.DEEPSEEK, {"n_group": 3}, "expert_groups=3: a divisor of"),
    (files.DEEPSEEK, {"quantization_config": {
      "quant_method": "fp8", "weight_block_size": 128,
    }}, "weight_block_size=128: needed are two sizes"),
    (files.GPT_OSS, {"experts_per_token": 4}, "4: supported: 2"),
    (files.GPT_OSS, {"layer_types": ["x", "y"]}, "one for each of 2 layers"),
    (files.GPT_OSS, {"sliding_window": None}, "sliding_window is missing"),
  ],
)  # fmt: skip
def test_what_a_family_does_not_have(fields, change, error, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
  with pytest.raises(ValueError, match=error):
    hf.read_config(tmp_path)


def test_a_missing_tensor(tmp_path, tensors):
  del tensors[ROUTER]
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  refused(folder, "tensors that are missing: ", re.escape(ROUTER) + "$")


def test_an_extra_tensor(tmp_path, tensors):
  tensors["model.layers.2.norm.weight"] = np.zeros(3, np.float32)
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  refused(folder, "doesn't ask for: ", r"model\.layers\.2\.norm\.weight$")


def test_a_config_that_contradicts_the_tensors(tmp_path, tensors):
  fields = {**files.MIXTRAL, "intermediate_size": 20}
  folder = files.write_folder(tmp_path, fields, tensors)
  refused(folder, r"w1\.weight has shape \[24, 32\]; ", r"for \[20, 32\]")
  fields = {**files.MIXTRAL, "num_hidden_layers": 3}
  folder = files.write_folder(tmp_path, fields, tensors)
  refused(folder, r"missing: model\.layers\.2\..* and \d+ more")


def test_a_tensor_of_another_kind(tmp_path, tensors):
  tensors[ROUTER] = tensors[ROUTER].astype(np.int64)
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  refused(folder, re.escape(ROUTER), "stored as I64; expected is one of")


def test_files_that_are_not_whole(tmp_path, tensors):
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  file = folder / "model-00002-of-00002.safetensors"
  whole = file.read_bytes()
  file.write_bytes(whole[:-100])
  refused(folder, r"00002\.safetensors: truncated: ", "ends at byte")
  file.write_bytes(whole + b"x")
  refused(folder, "its header describes")
  file.write_bytes(whole[:4])
  refused(folder, "no safetensors file")
  file.write_bytes(whole[:8] + b"#" + whole[9:])
  refused(folder, "damaged header")
  wrong = {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 4]}
  files.write_tensors(file, {"a": np.zeros(1, np.float32)}, a=wrong)
  refused(folder, r"a: F32 \[8, 8\] takes 256 bytes, the offsets say 4")
  one = np.zeros(1, np.float32)
  for begin in (0, 8):  # over another tensor, or behind a hole
    wrong = {"dtype": "F32", "shape": [1], "data_offsets": [begin, begin + 4]}
    files.write_tensors(file, {"a": one, "b": one}, b=wrong)
    refused(folder, rf"(a|b) begins at {begin}, expected 4")
  file.unlink()
  refused(folder, r"names files that are absent: model-00002-of-00002\.")


def test_an_index_that_does_not_fit_its_files(tmp_path, tensors):
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  index = json.loads((folder / INDEX).read_text())
  held = index["weight_map"].pop(ROUTER)
  (folder / INDEX).write_text(json.dumps(index))
  refused(folder, f"{held}: holds ", re.escape(ROUTER), "in no file")
  index["weight_map"] |= {ROUTER: held, "model.ghost": held}
  (folder / INDEX).write_text(json.dumps(index))
  refused(folder, f"model.ghost is not in {held}")
  (folder / INDEX).write_text("{")
  refused(folder, "not readable as JSON")


def test_an_empty_folder(tmp_path):
  refused(tmp_path, "no checkpoint there")
  (tmp_path / "config.json").write_text(json.dumps(files.MIXTRAL))
  refused(tmp_path, f"neither {INDEX} nor {SINGLE} is there")


def test_a_file_that_shrinks_while_it_is_read(tmp_path, tensors):
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  checkpoint = hf.Checkpoint(folder)
  for file in folder.glob("*.safetensors"):
    file.write_bytes(file.read_bytes()[:9000])
  with pytest.raises(ValueError, match=r"truncated: \d+ bytes of model"):
    checkpoint.dense()


def test_the_reference_dequantises_alike(rng):
  torch = pytest.importorskip("torch", reason="needs .[reference]")
  mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
  blocks = rng.integers(0, 256, (3, 10, 2, 16), np.uint8)
  scales = rng.integers(100, 150, (3, 10, 2), np.uint8)
  want = mxfp4.convert_moe_packed_tensors(
    torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
  )
  np.testing.assert_array_equal(quantized.mxfp4(blocks, scales), want.numpy())
