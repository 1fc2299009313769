import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import ModelConfig
from resilient_moe.model.router import route

CONFIG = ModelConfig(n_experts=6, top_k=3)
NONE = np.zeros(6, bool)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("renormalise", [True, False])
def test_route_is_softmax_then_top_k(renormalise, rng):
  config = dataclasses.replace(CONFIG, norm_topk_prob=renormalise)
  logits = rng.standard_normal((20, 6)).astype(np.float32) * 3
  experts, weights, probabilities = route(config, jnp.asarray(logits), NONE)
  p = softmax(logits.astype(np.float64))
  np.testing.assert_allclose(probabilities, p, atol=1e-6)
  want = np.argsort(-p, axis=1, kind="stable")[:, :3]
  np.testing.assert_array_equal(experts, want)
  chosen = np.take_along_axis(p, want, 1)
  if renormalise:
    chosen = chosen / chosen.sum(1, keepdims=True)
  np.testing.assert_allclose(weights, chosen, atol=1e-6)
  assert experts.dtype == jnp.int32


def test_masked_experts_are_replaced_by_the_next_best(rng):
  logits = rng.standard_normal((20, 6)).astype(np.float32)
  masked = np.array([True, False, False, True, False, False])
  experts, weights, p = route(CONFIG, jnp.asarray(logits), masked)
  assert not np.isin(experts, [0, 3]).any()
  assert (np.asarray(p)[:, masked] == 0).all()
  np.testing.assert_allclose(np.asarray(weights).sum(1), 1, atol=1e-6)
  order = np.argsort(-np.where(masked, -np.inf, logits), axis=1)
  np.testing.assert_array_equal(experts, order[:, :3])


def test_ties_go_to_the_first_expert():
  experts, weights, _ = route(CONFIG, jnp.zeros((2, 6)), NONE)
  np.testing.assert_array_equal(experts, [[0, 1, 2]] * 2)
  np.testing.assert_allclose(weights, 1 / 3, atol=1e-6)


def test_fewer_live_experts_than_k_leave_the_rest_without_weight():
  masked = np.array([False, True, True, True, False, True])
  logits = jnp.asarray([[0.0, 5, 5, 5, 0, 5]])
  experts, weights, _ = route(CONFIG, logits, masked)
  assert set(np.asarray(experts)[0, :2].tolist()) == {0, 4}
  np.testing.assert_allclose(np.asarray(weights)[0], [0.5, 0.5, 0], atol=1e-6)
