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


GROUPED = ModelConfig(n_experts=8, top_k=3, expert_groups=4, top_groups=2)


def sigmoid_reference(logits, correction, score, renormalise):
  """DeepSeek-V3's router for one token, in float64."""
  s = 1 / (1 + np.exp(-logits.astype(np.float64)))
  biased = s + correction
  pairs = biased.reshape(4, 2)
  groups = pairs.sum(1) if score == "top2" else pairs.max(1)
  best = np.argsort(-groups, kind="stable")[:2]
  allowed = np.isin(np.arange(8) // 2, best)
  chosen = np.argsort(-np.where(allowed, biased, -np.inf), kind="stable")[:3]
  weights = s[chosen] / (s[chosen].sum() if renormalise else 1)
  return chosen, weights * 2.5


@pytest.mark.parametrize("score", ["top2", "max"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_sigmoid_router_chooses_with_its_correction_and_weighs_without(
  score, renormalise, rng
):
  config = dataclasses.replace(
    GROUPED, router="sigmoid_topk", correction_bias=True, group_score=score,
    norm_topk_prob=renormalise, router_scale=2.5,
  )  # fmt: skip
  logits = rng.standard_normal((30, 8)).astype(np.float32)
  correction = rng.standard_normal(8).astype(np.float32) / 2
  experts, weights, _ = route(
    config, jnp.asarray(logits), np.zeros(8, bool), jnp.asarray(correction)
  )
  for i in range(30):
    want, w = sigmoid_reference(logits[i], correction, score, renormalise)
    np.testing.assert_array_equal(experts[i], want)
    np.testing.assert_allclose(weights[i], w, rtol=1e-5)


def test_softmax_after_top_k_is_over_the_chosen_alone(rng):
  config = dataclasses.replace(CONFIG, router="topk_softmax")
  logits = rng.standard_normal((20, 6)).astype(np.float32) * 3
  experts, weights, _ = route(config, jnp.asarray(logits), NONE)
  want = np.argsort(-logits, axis=1)[:, :3]
  np.testing.assert_array_equal(experts, want)
  best = np.take_along_axis(logits, want, 1).astype(np.float64)
  np.testing.assert_allclose(weights, softmax(best), atol=1e-6)


ROUTERS = {
  "softmax": ("softmax_topk", "max", False),
  "sigmoid": ("sigmoid_topk", "top2", True),
  "sigmoid-max": ("sigmoid_topk", "max", True),
  "sigmoid-flat": ("sigmoid_topk", "", True),  # without groups
  "topk": ("topk_softmax", "max", False),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("gone", [(0,), (0, 1), (0, 2, 4, 6), (1, 2, 3, 4, 7)])
def test_a_masked_expert_is_chosen_by_no_router(router, gone, rng):
  """Nor where its groups hold fewer live experts than a token needs."""
  name, score, corrected = ROUTERS[router]
  flat = name == "topk_softmax" or not score
  groups = {} if flat else {"group_score": score}
  base = ModelConfig(n_experts=8, top_k=3) if not groups else GROUPED
  config = dataclasses.replace(
    base, router=name, correction_bias=corrected, **groups
  )
  logits = rng.standard_normal((40, 8)).astype(np.float32)
  logits[:, list(gone)] += 50  # the best, were they there
  masked = np.isin(np.arange(8), gone)
  correction = jnp.asarray(np.where(masked, 9, 0.0), jnp.float32)
  experts, weights, _ = route(
    config, jnp.asarray(logits), masked, correction if corrected else None
  )
  assert not np.isin(experts, gone).any()
  assert np.isfinite(weights).all()
  for row in np.asarray(experts):
    assert len(set(row.tolist())) == 3


def grouped(logits, masked, correction, **changes):
  """The experts that one token goes to, ascending."""
  config = dataclasses.replace(
    GROUPED, router="sigmoid_topk", correction_bias=True, **changes
  )
  experts, weights, _ = route(
    config, jnp.asarray([logits], jnp.float32), np.asarray(masked, bool),
    jnp.asarray(correction, jnp.float32),
  )  # fmt: skip
  assert np.isfinite(weights).all()
  return sorted(np.asarray(experts)[0].tolist())


@pytest.mark.parametrize("score", ["top2", "max"])
def test_a_masked_expert_does_not_speak_for_its_group(score):
  masked = [1, 0, 0, 0, 0, 0, 0, 0]
  correction = [9, 0, 0, 0, 0, 0, 0, 0]
  logits = [0, -3, 1, 1, 2, 2, -1, -1]
  got = grouped(logits, masked, correction, group_score=score)
  assert got in ([2, 4, 5], [3, 4, 5])


def test_a_group_without_live_experts_comes_behind_those_with_one():
  """So that the better of two lone experts is chosen, not the first."""
  masked = [1, 1, 1, 0, 1, 0, 0, 0]
  logits = [0, 0, 0, -1, 0, 1, 3, 3]
  got = grouped(logits, masked, np.zeros(8), top_groups=3, group_score="top2")
  assert got == [5, 6, 7]


def test_scores_that_are_all_zero_leave_weights_that_are_numbers():
  assert len(grouped(np.full(8, -200), np.zeros(8), np.zeros(8))) == 3
