"""Where each tensor of a checkpoint goes, number by number; no torch."""

import json

import numpy as np
import pytest

from tests.third_party import files
from third_party import huggingface as hf


@pytest.fixture
def tensors(rng):
  return files.random_tensors(files.MIXTRAL, rng)


def test_matrices_lie_side_by_side_and_turned(tmp_path, tensors):
  """A square one too, of which no shape says which way it lies."""
  folder = files.write_folder(tmp_path, files.MIXTRAL, tensors)
  checkpoint = hf.Checkpoint(folder)
  [group] = checkpoint.dense()["groups"]
  for i in range(2):
    at = f"model.layers.{i}.self_attn"
    q, k, v, out = (tensors[f"{at}.{n}_proj.weight"].T for n in "qkvo")
    got = group["attention"]
    np.testing.assert_array_equal(got["qkv"][i], np.hstack([q, k, v]))
    np.testing.assert_array_equal(got["out"][i], out)
    router = tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"]
    np.testing.assert_array_equal(group["moe"]["router"][i], router.T)
    at = f"model.layers.{i}.block_sparse_moe.experts.3"
    gate, down, up = (tensors[f"{at}.w{n}.weight"].T for n in (1, 2, 3))
    got = checkpoint.expert(3)
    np.testing.assert_array_equal(got["gate_up"][i], np.hstack([gate, up]))
    np.testing.assert_array_equal(got["down"][i], down)


def test_latents_are_cut_and_pairs_become_halves(tmp_path, rng):
  """Heads of 4 numbers that stay and 2 pairs that turn; values of 4."""
  tensors = files.random_tensors(files.DEEPSEEK, rng)
  folder = files.write_folder(tmp_path, files.DEEPSEEK, tensors)
  first, _ = hf.Checkpoint(folder, "float32").dense()["groups"]
  got = {name: x[0] for name, x in first["attention"].items()}
  q, kv, up = (
    tensors[f"model.layers.0.self_attn.{name}.weight"]
    for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")
  )
  order = np.array([0, 1, 2, 3, 4, 6, 5, 7])
  both = np.concatenate([order, 8 + order])
  np.testing.assert_array_equal(got["q"], q[both].T)
  np.testing.assert_array_equal(got["kv_a"], kv[[*range(8), 8, 10, 9, 11]].T)
  heads = up.reshape(2, 8, 8)
  np.testing.assert_array_equal(got["k_up"], heads[:, :4])
  np.testing.assert_array_equal(got["v_up"], heads[:, 4:].swapaxes(1, 2))


def test_a_fingerprint_is_that_of_the_same_files(tmp_path, tensors):
  folder = files.write_folder(tmp_path / "a", files.MIXTRAL, tensors)
  other = files.write_folder(tmp_path / "b", files.MIXTRAL, tensors)
  mark = hf.Checkpoint(folder).fingerprint()
  assert hf.Checkpoint(other).fingerprint() == mark
  file = other / "model-00002-of-00002.safetensors"
  whole = file.read_bytes()
  assert len(whole) < 1 << 17  # so that its edges are all of it
  for place in (len(whole) - 1, len(whole) // 2):
    file.write_bytes(whole[:place] + b"!" + whole[place + 1 :])
    assert hf.Checkpoint(other).fingerprint() != mark
  file.write_bytes(whole)
  fields = {**files.MIXTRAL, "num_experts_per_tok": 3}
  (other / "config.json").write_text(json.dumps(fields))
  assert hf.Checkpoint(other).fingerprint() != mark


def test_layers_behind_those_that_predict_on_are_extra(tmp_path, rng):
  tensors = files.random_tensors(files.DEEPSEEK, rng)
  tensors["model.layers.2.eh_proj.weight"] = np.zeros((4, 4), np.float32)
  folder = files.write_folder(tmp_path, files.DEEPSEEK, tensors)
  assert hf.Checkpoint(folder).config.n_layers == 2
  tensors["model.layers.3.eh_proj.weight"] = np.zeros((4, 4), np.float32)
  files.write_folder(folder, files.DEEPSEEK, tensors)
  with pytest.raises(
    ValueError, match=r"ask for: .*layers\.3\.eh_proj.weight$"
  ):
    hf.Checkpoint(folder)
