import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import forward, init_params, train_forward
from tests.model.harness import TINY

CONFIGS = {
  "tiny": TINY,
  "untied-raw-gates": dataclasses.replace(
    TINY, tied_embeddings=False, norm_topk_prob=False, shared_width=0
  ),
}


def inputs(config, rng):
  params = init_params(config, jax.random.key(2))
  tokens = rng.integers(0, config.vocab_size, (2, 19)).astype(np.int32)
  return params, jnp.asarray(tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_computes_what_serving_computes(name, rng):
  config = CONFIGS[name]
  params, tokens = inputs(config, rng)
  run = jax.jit(lambda p, t: train_forward(config, p, t))
  logits, stats = run(params, tokens)
  want = forward(config, params, tokens)
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)
  for value in stats.values():
    assert value.shape == (config.moe_layers, config.n_experts)
    np.testing.assert_allclose(value.sum(axis=1), 1, atol=1e-5)
  assert set(stats) == {"router_probs_mean", "expert_load"}


def test_every_parameter_gets_a_finite_gradient(rng):
  config = CONFIGS["tiny"]
  params, tokens = inputs(config, rng)

  def loss(params):
    logits, stats = train_forward(config, params, tokens)
    balance = (stats["router_probs_mean"] * stats["expert_load"]).sum()
    chosen = jnp.take_along_axis(
      jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
    )
    return balance - chosen.mean()

  gradients = jax.jit(jax.grad(loss))(params)
  for path, g in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(g).all(), path
    assert (np.asarray(g) != 0).any(), path


def test_tokens_of_another_kind_are_one_clear_error():
  params = init_params(TINY, jax.random.key(0))
  for tokens in (jnp.zeros((2, 3)), jnp.zeros((3,), jnp.int32)):
    with pytest.raises(ValueError, match=r"an integer \[B, T\] is needed"):
      forward(TINY, params, tokens)
