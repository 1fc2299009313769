"""Saved models: what is loaded again, by us and by the reference."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import resilient_moe as rm
from tests.model.harness import tiny_params
from tests.third_party import files
from third_party import huggingface as hf

SHIPPED = pathlib.Path(rm.__file__).parent / "assets" / "byte_moe"
MIXTRAL = rm.ModelConfig(
  vocab_size=64, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16,
  n_experts=4, expert_width=24, norm_eps=1e-5, rope_theta=5e5,
  rope_scaling="llama3", rope_factor=8.0, rope_length=32, windows=(6, 6),
)  # fmt: skip
QWEN3 = dataclasses.replace(
  MIXTRAL, n_layers=4, windows=(), dense_layers=1, dense_at=(2,),
  dense_width=20, qk_norm="head", norm_topk_prob=False, attention_bias=True,
  tied_embeddings=False, rope_scaling="yarn", rope_magnitude=1.2,
)  # fmt: skip
MODELS = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3}


@pytest.mark.parametrize("family", MODELS)
def test_what_is_saved_is_loaded_again(family, tmp_path):
  config = MODELS[family]
  params = tiny_params(config)
  rm.save_huggingface(
    tmp_path / "m", config, params, family, max_shard_bytes=20_000
  )
  assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
  sizes = [f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors")]
  assert max(sizes) < 25_000  # headers besides
  again, loaded = rm.load_huggingface(tmp_path / "m")
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_bfloat16_stays_bfloat16(tmp_path):
  config = dataclasses.replace(MIXTRAL, dtype="bfloat16")
  params = tiny_params(config)
  rm.save_huggingface(tmp_path / "m", config, params, "mixtral")
  assert (tmp_path / "m" / "model.safetensors").is_file()
  _, loaded = rm.load_huggingface(tmp_path / "m", "bfloat16")
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("name", ["shipped", *MODELS])
def test_the_reference_computes_the_same_from_it(name, tmp_path, rng):
  from tests.third_party import reference as ref  # skips without torch

  family = name if name in MODELS else "mixtral"
  if name == "shipped":
    config, params = rm.load_checkpoint(SHIPPED)
  else:
    config, params = MODELS[name], tiny_params(MODELS[name])
  folder = tmp_path / "m"
  rm.save_huggingface(folder, config, params, family, max_shard_bytes=500_000)
  with ref.quiet():
    model = ref.transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation="eager", experts_implementation="eager"
    ).eval()
  tokens = rng.integers(0, config.vocab_size, (2, 24), np.int32)
  got = ref.Reference(model, folder).logits(tokens)
  want = np.asarray(rm.forward(config, params, tokens))
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  ("family", "change", "error"),
  [
    ("gpt2", {}, "family='gpt2': choose mixtral, qwen3_moe"),
    ("mixtral", {"shared_width": 8}, "shared_width=8 can't be saved as mixt"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False can't"),
    ("mixtral", {"windows": (6, 0)}, r"windows=\(6, 0\) can't .*\(6, 6\)"),
    ("mixtral", {"dense_layers": 1, "dense_width": 8}, "dense_layers=1 can't"),
    ("qwen3_moe", {}, "qk_norm='none' can't be saved as qwen3_moe, which has"),
    ("qwen3_moe", {"qk_norm": "head", "sinks": True}, "sinks=True can't"),
  ],
)
def test_what_a_family_cannot_say(family, change, error, tmp_path):
  config = dataclasses.replace(MIXTRAL, **change)
  with pytest.raises(ValueError, match=error):
    rm.save_huggingface(tmp_path / "m", config, {}, family)
  assert list(tmp_path.iterdir()) == []


def test_only_a_checkpoint_is_replaced(tmp_path):
  (tmp_path / "m").mkdir()
  (tmp_path / "m" / "thesis.tex").write_text("mine")
  params = tiny_params(MIXTRAL)
  with pytest.raises(ValueError, match="is there and holds no checkpoint"):
    rm.save_huggingface(tmp_path / "m", MIXTRAL, params, "mixtral")
  assert (tmp_path / "m" / "thesis.tex").read_text() == "mine"
  for _ in range(2):
    rm.save_huggingface(tmp_path / "n", MIXTRAL, params, "mixtral")
  assert {f.name for f in tmp_path.iterdir()} == {"m", "n"}


def test_our_own_files_are_the_format_of_the_package(tmp_path):
  """The reader of whoever made the format reads what we wrote."""
  numpy = pytest.importorskip("safetensors.numpy")
  rm.save_huggingface(tmp_path / "m", MIXTRAL, tiny_params(MIXTRAL), "mixtral")
  got = numpy.load_file(tmp_path / "m" / "model.safetensors")
  want = tiny_params(MIXTRAL)["embed"]
  np.testing.assert_array_equal(got["model.embed_tokens.weight"], want)
  config = json.loads((tmp_path / "m" / "config.json").read_text())
  assert set(got) == set(files.random_tensors(config, np.random.default_rng()))
  assert hf.is_checkpoint(tmp_path / "m")
