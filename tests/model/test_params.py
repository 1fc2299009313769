"""One description: shapes, shardings and initial values agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import ModelConfig, describe, init_params
from resilient_moe.model.params import (
  _initial,
  count_params,
  expert_bytes,
  is_spec,
)

BASE = ModelConfig(
  vocab_size=48, n_layers=3, d_model=32, n_heads=4, head_dim=8, n_experts=6,
  expert_width=20,
)  # fmt: skip
CONFIGS = {
  "plain": BASE,
  "dense": dataclasses.replace(BASE, dense_layers=2, dense_width=24),
  "shared": dataclasses.replace(BASE, shared_width=16),
  "untied": dataclasses.replace(BASE, tied_embeddings=False),
  "bfloat16": dataclasses.replace(BASE, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_follow_the_description(name):
  config = CONFIGS[name]
  specs = describe(config)
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  assert jax.tree.structure(params) == jax.tree.structure(
    jax.tree.map(lambda s: 0, specs, is_leaf=is_spec)
  )
  flat = jax.tree.leaves(specs, is_leaf=is_spec)
  for spec, value in zip(flat, jax.tree.leaves(params), strict=True):
    assert value.shape == spec.shape
    assert value.dtype == spec.dtype == config.dtype
    assert len(spec.axes) == len(spec.shape) == len(spec.sharding)
    assert spec.nbytes == value.size * value.dtype.itemsize
  assert count_params(config) == sum(v.size for v in jax.tree.leaves(params))


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_sharded_and_nothing_else(name):
  for spec in jax.tree.leaves(describe(CONFIGS[name]), is_leaf=is_spec):
    if spec.is_expert:
      assert tuple(spec.sharding[:2]) == (None, "ep")
      assert spec.shape[1] == BASE.n_experts
    assert ("ep" in spec.sharding) == spec.is_expert


def test_options_add_what_they_name():
  tree = describe(CONFIGS["dense"])
  assert [("mlp" in g, "moe" in g) for g in tree["groups"]] == [
    (True, False), (False, True),
  ]  # fmt: skip
  assert tree["groups"][0]["mlp"]["down"].shape == (2, 24, 32)
  shared = describe(CONFIGS["shared"])["groups"][0]["moe"]["shared"]
  assert shared["gate_up"].shape == (3, 32, 32)
  assert "lm_head" not in describe(BASE)
  assert describe(CONFIGS["untied"])["lm_head"].shape == (32, 48)


def test_initial_values_have_their_scale():
  layer = describe(BASE)["groups"][0]
  key = jax.random.key(1)
  np.testing.assert_array_equal(_initial(layer["mlp_norm"], key), 1)
  spec = describe(BASE)["experts"]["down"]
  assert spec.fan_in == BASE.expert_width
  down = _initial(spec, key)
  assert float(jnp.std(down)) == pytest.approx(20**-0.5, rel=0.05)
  assert not np.array_equal(down[:, 0], down[:, 1])  # experts differ


def test_expert_bytes_are_one_expert_over_all_layers():
  per_layer = 32 * 2 * 20 + 20 * 32
  assert expert_bytes(BASE) == 3 * per_layer * 4
  assert expert_bytes(CONFIGS["dense"]) == per_layer * 4
  assert expert_bytes(CONFIGS["bfloat16"]) == 3 * per_layer * 2
