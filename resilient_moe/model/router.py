"""Which experts a token goes to, and with what weights."""

import jax
import jax.numpy as jnp

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.rows import pairwise_sum, softmax


def route(
  config: ModelConfig, logits: jax.Array, masked: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Softmax over all experts in float32, then the top k (Mixtral's router).

  Args:
    config: the model.
    logits: [N, E].
    masked: [E] bool; a masked expert's logit becomes -inf, so that the next
      best is chosen (ReviveMoE, "missing experts").

  Returns:
    experts [N, k] int32, weights [N, k], probabilities [N, E] float32.
  """
  logits = jnp.where(masked[None, :], -jnp.inf, logits.astype(jnp.float32))
  probabilities = softmax(logits)
  weights, experts = jax.lax.top_k(probabilities, config.top_k)
  if config.norm_topk_prob:
    weights = weights / pairwise_sum(weights)[:, None]
  return experts.astype(jnp.int32), weights, probabilities
