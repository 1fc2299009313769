"""Sampling that a failure can't change: keyed by (request seed, position)."""

import jax
import jax.numpy as jnp


def sample(
  logits: jax.Array,  # [n, V]
  seeds: jax.Array,  # [n] int32
  positions: jax.Array,  # [n] int32 position of the token to be chosen
  temperatures: jax.Array,  # [n] float32; 0: greedy
) -> jax.Array:
  """One token a row, [n] int32.

  Temperature sampling adds Gumbel noise and takes the maximum; the noise
  depends on the request's seed and the position only, so that a re-run step,
  another rank or another batch choose the same token.
  """
  logits = logits.astype(jnp.float32)

  def noisy(_: int) -> jax.Array:
    def one(
      row: jax.Array, seed: jax.Array, position: jax.Array,
      temperature: jax.Array,
    ) -> jax.Array:  # fmt: skip
      key = jax.random.fold_in(jax.random.key(seed), position)
      noise = jax.random.gumbel(key, row.shape, jnp.float32)
      scaled = row / jnp.maximum(temperature, 1e-6) + noise
      return jnp.where(temperature > 0, scaled, row)

    return jax.vmap(one)(logits, seeds, positions, temperatures)

  # Noise over a large vocabulary isn't free: greedy batches skip it.
  chosen = jax.lax.cond(jnp.any(temperatures > 0), noisy, lambda _: logits, 0)
  return jnp.argmax(chosen, axis=-1).astype(jnp.int32)
