import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import forward, train_forward
from tests.model.harness import OPTIONS, OTHER, TINY, fast_jit, tiny_params


def inputs(config, rng):
  params = jax.tree.map(jnp.asarray, tiny_params(config))
  tokens = rng.integers(0, config.vocab_size, (2, 31)).astype(np.int32)
  return params, jnp.asarray(tokens)


def test_training_computes_what_serving_does_and_has_a_gradient(rng):
  config = TINY
  params, tokens = inputs(config, rng)
  (_, (logits, stats)), gradients = trained(config, params, tokens)
  want = forward(config, params, tokens, OPTIONS)
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)
  for value in stats.values():
    assert value.shape == (config.moe_layers, config.n_experts)
    np.testing.assert_allclose(value.sum(axis=1), 1, atol=1e-5)
  assert set(stats) == {"router_probs_mean", "expert_load"}
  for path, g in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(g).all(), path
    assert (np.asarray(g) != 0).any(), path


def test_so_it_does_with_other_kinds_of_layers(rng):
  params, tokens = inputs(OTHER, rng)
  logits, _ = fast_jit(lambda p: train_forward(OTHER, p, tokens))(params)
  want = forward(OTHER, params, tokens, OPTIONS)
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)


def trained(config, params, tokens):
  """The loss of training, what it was computed from, and its gradients."""

  def loss(params):
    logits, stats = train_forward(config, params, tokens)
    balance = (stats["router_probs_mean"] * stats["expert_load"]).sum()
    chosen = jnp.take_along_axis(
      jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
    )
    return balance - chosen.mean(), (logits, stats)

  return fast_jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_tokens_of_another_kind_are_one_clear_error():
  params = tiny_params()
  for tokens in (jnp.zeros((2, 3)), jnp.zeros((3,), jnp.int32)):
    with pytest.raises(ValueError, match=r"an integer \[B, T\] is needed"):
      forward(TINY, params, tokens)
