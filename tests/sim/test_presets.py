"""Simulated shapes are those of `model.presets`: two lists, one truth.

The simulator must not import JAX, so it has a list of its own.
"""

import pytest

from resilient_moe.model.presets import PRESETS, preset
from resilient_moe.model.sizes import model_size
from resilient_moe.sim.shapes import MODELS, shape

SHARED = (
  "vocab_size", "n_layers", "d_model", "n_heads", "n_experts", "top_k",
  "expert_width", "shared_width", "dense_layers", "dense_width",
  "tied_embeddings", "moe_layers",
)  # fmt: skip


def test_both_lists_have_the_same_models():
  assert set(MODELS) == {*PRESETS, "byte_moe"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_is_its_preset(name):
  simulated, config = shape(name), preset(name)
  for field in SHARED:
    assert getattr(simulated, field) == getattr(config, field), field
  assert not config.dense_at, "shapes know only of first dense layers"
  assert simulated.kv_values == config.kv_heads * config.kv_width
  if config.attention == "mla":
    a = simulated.latent
    assert (a.q_rank, a.kv_rank, a.nope, a.rope, a.value) == (
      config.q_rank, config.kv_rank, config.nope_dim, config.rope_dim,
      config.value_dim,
    )  # fmt: skip
  else:
    assert simulated.latent is None
    assert simulated.n_kv_heads == config.n_kv_heads
    assert simulated.head_dim == config.head_dim
  seen = [window for window in config.windows if window]
  assert simulated.windowed_layers == len(seen)
  assert set(seen) <= {simulated.window}
  # Norms and biases are left out.
  size = model_size(config)
  assert simulated.params == pytest.approx(size.params, rel=1e-3)
