"""What scoring does about experts that are gone."""

import dataclasses

import jax
import numpy as np
import pytest

from resilient_moe.model import forward, lost
from resilient_moe.model.forward import _forward, expert_load
from tests.model.families import SINKS
from tests.model.harness import OPTIONS, TINY, tiny_params

GONE = np.isin(np.arange(TINY.n_experts), (1, 4))
TOKENS = np.random.default_rng(2).integers(0, 96, (2, 31)).astype(np.int32)


def params_with(change):
  """The tiny model with its experts' stacks changed."""
  params = tiny_params()
  experts = jax.tree.map(lambda x: change(x.copy()), params["experts"])
  return {**params, "experts": experts}


def score(params, what=None):
  return np.asarray(forward(TINY, params, TOKENS, OPTIONS, what))


def test_masked_experts_are_never_used():
  def poison(x):
    x[:, GONE] = np.nan
    return x

  what = lost.mask(TINY, GONE)
  got = score(params_with(poison), what)
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(got, score(tiny_params(), what))
  assert not np.allclose(got, score(tiny_params()), atol=1e-3)


def test_a_dropped_expert_adds_nothing_and_its_weight_stays():
  """As if its last matrix were zero."""

  def silence(x):
    x[:, GONE] = 0
    return x

  got = score(tiny_params(), lost.drop(TINY, GONE))
  np.testing.assert_array_equal(got, score(params_with(silence)))


def test_the_nearest_live_expert_answers_layer_by_layer():
  """As if its weights lay where the lost ones did."""
  by_layer = np.zeros((2, 7), bool)
  by_layer[0, [1, 4]], by_layer[1, [0, 2]] = True, True
  near = {(0, 1): 6, (0, 4): 0, (1, 0): 5, (1, 2): 1}

  def close(x):
    for (layer, gone), alive in near.items():
      x[layer, gone] = x[layer, alive] + 1e-3 * x[layer, gone]
    return x

  def same(x):
    for (layer, gone), alive in near.items():
      x[layer, gone] = x[layer, alive]
    return x

  params = params_with(close)
  what = lost.substitute(TINY, params, by_layer)
  for (layer, gone), alive in near.items():
    assert int(what.answers[layer, gone]) == alive
  np.testing.assert_array_equal(score(params, what), score(params_with(same)))


def test_nothing_lost_changes_no_bit_and_costs_nothing():
  nobody = np.zeros(TINY.n_experts, bool)
  want = score(tiny_params())
  for what in (lost.mask(TINY, nobody), lost.drop(TINY, nobody)):
    np.testing.assert_array_equal(score(tiny_params(), what), want)
  lower = lambda what: _forward.lower(
    TINY, OPTIONS, tiny_params(), TOKENS, what
  ).as_text()
  tables = jax.tree.leaves(lost.drop(TINY, nobody))
  assert all(f"tensor<2x7x{t}>" in lower(lost.drop(TINY, nobody))
             for t in ("i1", "i32"))  # fmt: skip
  assert len(tables) == 2
  assert "tensor<2x7xi1>" not in lower(None)
  assert "tensor<2x7xi32>" not in lower(None)


def test_biases_count_in_the_distance():
  params = tiny_params(SINKS)
  experts = {n: x.copy() for n, x in params["experts"].items()}
  for name in ("gate_up", "down", "gate_up_bias"):
    experts[name][:] = experts[name][:, :1]
  experts["down_bias"][:, :] = 9 * np.arange(8)[None, :, None]
  experts["down_bias"][:, 3] = 9 * 5 + 1
  gone = np.arange(8) == 3
  what = lost.substitute(SINKS, {**params, "experts": experts}, gone)
  np.testing.assert_array_equal(what.answers[:, 3], 5)


def test_expert_load_is_the_share_of_assignments():
  load = expert_load(TINY, tiny_params(), TOKENS, OPTIONS)
  assert load.shape == (2, 7)
  np.testing.assert_allclose(load.sum(axis=1), 1, atol=1e-6)
  alone = dataclasses.replace(TINY, n_layers=1)
  first = {**tiny_params(), "groups": [
    jax.tree.map(lambda x: x[:1], tiny_params()["groups"][0])]}  # fmt: skip
  first["experts"] = {n: x[:1] for n, x in first["experts"].items()}
  np.testing.assert_array_equal(
    expert_load(alone, first, TOKENS, OPTIONS)[0], load[0]
  )


@pytest.mark.parametrize(("gone", "message"), [
  (np.zeros(6, bool), r"bool \(6,\); bool \[E=7\] or \[L_moe=2, E=7\]"),
  (np.zeros(7), r"float64 \(7,\); bool"),
  (np.arange(7) > 0, "1 experts are left in a layer; at least top_k=2"),
])  # fmt: skip
def test_bad_losses_are_one_clear_error(gone, message):
  with pytest.raises(ValueError, match=message):
    lost.drop(TINY, gone)
