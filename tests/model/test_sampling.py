import jax.numpy as jnp
import numpy as np

from resilient_moe.model.sampling import sample
from tests.model.harness import fast_jit

draw = fast_jit(sample)
V = 24


def ask(logits, seeds, positions, temperatures):
  n = len(logits)
  wide = lambda x, t: np.broadcast_to(np.asarray(x, t), (n,))
  return np.asarray(
    draw(
      jnp.asarray(logits, jnp.float32), wide(seeds, np.int32),
      wide(positions, np.int32), wide(temperatures, np.float32),
    )
  )  # fmt: skip


def test_temperature_zero_is_greedy_beside_any_row(rng):
  logits = rng.integers(0, 4, (16, V))  # ties go to the first
  heat = np.where(np.arange(16) % 2, 1.5, 0.0)
  best = logits.argmax(1)
  np.testing.assert_array_equal(ask(logits, 3, 4, 0.0), best)
  mixed = ask(logits, 3, 4, heat)
  np.testing.assert_array_equal(mixed[::2], best[::2])


def test_token_depends_on_seed_and_position_and_not_on_the_row(rng):
  logits = np.tile(rng.standard_normal(V), (16, 1))
  seeds, positions = np.arange(16) // 4, np.arange(16) % 4
  tokens = ask(logits, seeds, positions, 1.0)
  order = rng.permutation(16)
  again = ask(logits[order], seeds[order], positions[order], 1.0)
  np.testing.assert_array_equal(again, tokens[order])
  assert len(set(ask(logits, seeds * 0, np.arange(16), 1.0))) > 1
  assert len(set(ask(logits, np.arange(16), 0, 1.0))) > 1
  assert len(set(ask(logits, 5, 7, 1.0))) == 1


def test_distribution_is_the_softmax(rng):
  n = 4096
  logits = rng.standard_normal(V) * 1.5
  for heat in (0.5, 1.0):
    tokens = np.concatenate(
      [
        ask(np.tile(logits, (16, 1)), np.arange(i, i + 16), i, heat)
        for i in range(0, n, 16)
      ]
    )
    p = np.exp(logits / heat)
    p /= p.sum()
    found = np.bincount(tokens, minlength=V) / n
    # Three standard errors, and a bit for the rarest tokens.
    assert (abs(found - p) < 4 * np.sqrt(p / n) + 2e-3).all()
