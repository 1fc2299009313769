import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from resilient_moe.model import checkpoint as ckpt
from tests.model.harness import OTHER, tiny_params


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A checkpoint that nobody writes to."""
  path = tmp_path_factory.mktemp("checkpoint") / "model"
  ckpt.save_checkpoint(path, OTHER, tiny_params(OTHER))
  return path


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
  """A checkpoint to break."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / "model"))


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def data_file(folder: pathlib.Path) -> pathlib.Path:
  """The largest file: weights."""
  files = [f for f in (folder / "params").rglob("*") if f.is_file()]
  return max(files, key=lambda f: f.stat().st_size)


def test_round_trip(saved):
  config, params = ckpt.load_checkpoint(saved)
  assert config == OTHER
  assert_equal(params, tiny_params(OTHER))


def test_host_tree_has_each_expert_by_itself(saved):
  _, tree = ckpt.load_host(saved)
  assert sorted(tree["experts"]) == [f"{e:03d}" for e in range(7)]
  leaves = jax.tree.leaves(tree)
  assert all(isinstance(x, np.ndarray) for x in leaves)
  assert_equal(ckpt.join_experts(tree), tiny_params(OTHER))


def test_bfloat16_on_disk_comes_back_as_the_config_says(tmp_path, saved):
  path = tmp_path / "small"
  ckpt.save_checkpoint(path, OTHER, tiny_params(OTHER), dtype="bfloat16")
  _, params = ckpt.load_checkpoint(path)
  rounded = jax.tree.map(
    lambda x: x.astype("bfloat16").astype(np.float32), tiny_params(OTHER)
  )
  assert_equal(params, rounded)
  size = lambda p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file())
  assert size(path) < 0.75 * size(saved)


def test_experts_come_alone(saved, monkeypatch):
  experts = tiny_params(OTHER)["experts"]
  asked = []
  restore = ckpt._restore
  monkeypatch.setattr(
    ckpt, "_restore", lambda f, w: asked.append(w) or restore(f, w)
  )
  got = ckpt.load_experts(saved, OTHER, [5, 2])
  assert list(got) == [5, 2]
  for e, tree in got.items():
    assert_equal(tree, {n: w[:, e] for n, w in experts.items()})
  assert list(asked[0]) == ["experts"]
  assert sorted(asked[0]["experts"]) == ["002", "005"]


def _without_manifest(folder):
  (folder / "manifest.json").unlink()


def _manifest_cut_off(folder):
  file = folder / "manifest.json"
  file.write_text(file.read_text()[:40])


def _truncated(folder):
  file = data_file(folder)
  file.write_bytes(file.read_bytes()[:-7])


def _flipped(folder):
  file = data_file(folder)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)


def _file_gone(folder):
  data_file(folder).unlink()


def _without_config(folder):
  (folder / "config.json").unlink()


def _edited(folder, **fields):
  """Changes the config, and the manifest with it."""
  file = folder / "config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
  manifest = json.dumps(ckpt._fingerprints(folder))
  (folder / "manifest.json").write_text(manifest)


def _config_not_json(folder):
  (folder / "config.json").write_text("{")


def _all_gone(folder):
  shutil.rmtree(folder)


BROKEN = {
  "all gone": (_all_gone, "no checkpoint there"),
  "no manifest": (_without_manifest, "without manifest.json: incomplete"),
  "manifest cut off": (_manifest_cut_off, "manifest.json: not valid JSON"),
  "truncated": (_truncated, "corrupt checkpoint: params/.* bytes"),
  "flipped byte": (_flipped, "corrupt checkpoint: params/.* CRC"),
  "file gone": (_file_gone, "corrupt checkpoint: params/.* is missing"),
  "no config": (_without_config, "config.json is missing"),
  "config not JSON": (_config_not_json, "config.json: not valid JSON"),
  "unknown field": (lambda f: _edited(f, depth=3), "unknown fields .'depth'"),
  "bad value": (lambda f: _edited(f, top_k=99), "top_k=99: at most"),
  "other shapes": (lambda f: _edited(f, d_model=64), "has shape .* asks for"),
  "more experts": (lambda f: _edited(f, n_experts=9), "has shape .* asks for"),
  "missing array": (
    lambda f: _edited(f, shared_width=16),
    "'shared'.* is missing; the config asks for",
  ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_one_clear_error(how, copy):
  breaks, message = BROKEN[how]
  breaks(copy)
  with pytest.raises(ValueError, match=message) as error:
    ckpt.load_checkpoint(copy)
  assert str(copy) in str(error.value) or how == "bad value"


def test_a_save_that_fails_leaves_the_old_checkpoint(copy, monkeypatch):
  def fails(_):
    raise OSError("disk full")

  monkeypatch.setattr(ckpt, "_fingerprints", fails)
  changed = jax.tree.map(lambda x: x + 1, tiny_params(OTHER))
  with pytest.raises(OSError, match="disk full"):
    ckpt.save_checkpoint(copy, OTHER, changed)
  monkeypatch.undo()
  assert_equal(ckpt.load_checkpoint(copy)[1], tiny_params(OTHER))
  # Neither what is left of it nor the old one is in the way of the next.
  ckpt.save_checkpoint(copy, OTHER, changed)
  assert_equal(ckpt.load_checkpoint(copy)[1], changed)
  assert [p.name for p in copy.parent.iterdir()] == ["model"]
