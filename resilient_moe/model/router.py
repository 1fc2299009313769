"""Which experts a token goes to, and with what weights.

A masked expert (ReviveMoE, "missing experts") is never chosen while another
is left, in whatever router: its score becomes the least there is before
anything is compared, so that the next best is chosen.
"""

import jax
import jax.numpy as jnp

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.rows import pairwise_sum, softmax

_LEAST = float(jnp.finfo(jnp.float32).min)  # of a number, not of -inf


def route(
  config: ModelConfig,
  logits: jax.Array,
  masked: jax.Array,
  correction: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The k best experts of each token, in float32.

  Args:
    config: the model.
    logits: [N, E].
    masked: [E] bool, hidden experts.
    correction: [E] added to the scores for the choice alone (DeepSeek-V3,
      section 2.1.2), or None.

  Returns:
    experts [N, k] int32, weights [N, k], scores of all experts [N, E]: the
    router's probabilities.
  """
  hidden = masked[None, :]
  logits = jnp.where(hidden, -jnp.inf, logits.astype(jnp.float32))
  scores = _scores(config, logits)
  choice = logits if config.router == "topk_softmax" else scores
  if correction is not None:
    choice = choice + correction[None, :]
  choice = jnp.where(hidden, -jnp.inf, choice)
  if config.expert_groups > 1:
    choice = jnp.where(_allowed(config, choice), choice, _LEAST)
    choice = jnp.where(hidden, -jnp.inf, choice)
  _, experts = jax.lax.top_k(choice, config.top_k)
  weights = jnp.take_along_axis(scores, experts, axis=1)
  if config.router == "topk_softmax":
    weights = softmax(jnp.take_along_axis(logits, experts, axis=1))
  elif config.norm_topk_prob:
    total = pairwise_sum(weights)[:, None]
    if config.router == "sigmoid_topk":
      total = total + 1e-20
    weights = weights / total
  if config.router_scale != 1:
    weights = weights * config.router_scale
  return experts.astype(jnp.int32), weights, scores


def _scores(config: ModelConfig, logits: jax.Array) -> jax.Array:
  """What experts are weighed by, [N, E]; 0 for a masked one."""
  if config.router == "sigmoid_topk":
    return jax.nn.sigmoid(logits)
  return softmax(logits)


def _allowed(config: ModelConfig, choice: jax.Array) -> jax.Array:
  """Experts [N, E] of the groups that a token may choose from.

  Groups that hold fewer live experts than their score counts come last.
  """
  n, e = choice.shape
  members = jnp.maximum(choice, -1e30).reshape(n, config.expert_groups, -1)
  if config.group_score == "max":
    score = members.max(axis=-1)
  else:
    score = jax.lax.top_k(members, 2)[0].sum(axis=-1)
  _, groups = jax.lax.top_k(score, config.top_groups)
  group = jnp.arange(e, dtype=jnp.int32) // members.shape[-1]
  return (groups[:, :, None] == group[None, None, :]).any(axis=1)
