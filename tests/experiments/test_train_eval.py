"""Scores: every byte once, from enough bytes before it."""

import jax
import numpy as np
import pytest

from experiments import train_eval
from resilient_moe.model import ModelConfig, forward, init_params

CONFIG = ModelConfig(
  n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8,
  n_experts=4, top_k=2, expert_width=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, jax.random.key(0))


def _stream(n: int) -> np.ndarray:
  return np.random.default_rng(0).integers(1, 256, n).astype(np.uint8)


def _reference_bits(params, window: np.ndarray) -> np.ndarray:
  """Bits of the bytes of `window` behind a separator."""
  tokens = np.zeros((1, 16), np.int32)  # one shape, one compilation
  tokens[0, 1 : len(window)] = window[:-1]
  logits = forward(CONFIG, params, tokens)[0]
  log_p = np.asarray(jax.nn.log_softmax(logits))
  return -log_p[np.arange(len(window)), window] / np.log(2)


def test_a_short_stream_is_scored_as_the_serving_model_would(params) -> None:
  stream = _stream(16)
  scored = train_eval.evaluate(CONFIG, params, stream, context=16)
  np.testing.assert_allclose(
    scored.bits, _reference_bits(params, stream), atol=1e-4
  )
  assert scored.bits_per_byte == pytest.approx(scored.bits.mean())


@pytest.mark.parametrize("n", [5, 16, 17, 24, 40, 61])
def test_every_byte_is_scored_once_behind_half_a_context(params, n) -> None:
  stream = _stream(n)
  bits = train_eval.evaluate(CONFIG, params, stream, context=16, batch=2).bits
  assert bits.shape == (n,)
  assert (bits > 0).all()
  for i in range(n):
    start = max(0, i // 8 * 8 - 8)
    # A window after the first has a separator for the byte before it.
    expected = _reference_bits(params, stream[start : i + 1])[-1]
    assert bits[i] == pytest.approx(expected, abs=1e-4)


def test_loads_are_fractions_and_entropy_is_relative(params) -> None:
  scored = train_eval.evaluate(CONFIG, params, _stream(100), context=16)
  assert scored.load.shape == (2, 4)
  np.testing.assert_allclose(scored.load.sum(axis=1), 1, atol=1e-5)
  even = train_eval.Evaluation(scored.bits, np.full((1, 4), 0.25))
  one = train_eval.Evaluation(scored.bits, np.eye(4)[:1])
  assert even.load_entropy == pytest.approx(1)
  assert one.load_entropy == pytest.approx(0, abs=1e-6)


def test_a_cold_sample_is_the_likeliest_continuation(params) -> None:
  prompt = b"\0ab"
  text = train_eval.sample(CONFIG, params, prompt, 4, seed=0, temperature=1e-6)
  assert text.startswith(prompt)
  assert len(text) == 7
  tokens = np.frombuffer(text, np.uint8).astype(np.int32)
  logits = np.asarray(forward(CONFIG, params, tokens[None, :-1]))[0]
  np.testing.assert_array_equal(logits[2:].argmax(axis=-1), tokens[3:])


def test_samples_repeat_with_their_seed(params) -> None:
  a, b, c = (
    train_eval.sample(CONFIG, params, b"\0", 8, seed=s) for s in (1, 1, 2)
  )
  assert a == b != c


def test_an_empty_stream_is_refused(params) -> None:
  with pytest.raises(ValueError, match="0 bytes, context 16"):
    train_eval.evaluate(CONFIG, params, _stream(0), context=16)
