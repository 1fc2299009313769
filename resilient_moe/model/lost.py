"""Experts that are gone, for scoring what their loss costs.

Serving masks them (`MaskExperts`). The two alternatives here are for
comparison: what the expert would have added is dropped, or another expert
answers in its place; in both the router's weights stay as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resilient_moe.model.config import ModelConfig


class Lost(NamedTuple):
  """What `forward` does about lost experts, as data."""

  masked: jax.Array  # [L_moe, E] bool, hidden from the gate
  answers: jax.Array | None = None  # [L_moe, E] int32 who does; -1: nobody


def mask(config: ModelConfig, gone: np.ndarray) -> Lost:
  """The gate chooses the next best. `gone` is [E] or [L_moe, E] bool."""
  return Lost(jnp.asarray(_by_layer(config, gone)))


def drop(config: ModelConfig, gone: np.ndarray) -> Lost:
  """The gate chooses as ever, and a lost expert adds nothing."""
  gone = _by_layer(config, gone)
  everyone = np.arange(config.n_experts, dtype=np.int32)[None]
  answers = np.where(gone, np.int32(-1), everyone)
  return Lost(jnp.zeros(gone.shape, bool), jnp.asarray(answers))


def substitute(
  config: ModelConfig, params: dict[str, Any], gone: np.ndarray
) -> Lost:
  """The live expert whose weights are nearest answers, layer by layer.

  Nearest in the Euclidean distance of all its numbers, biases included.
  """
  gone = _by_layer(config, gone)
  answers = np.tile(np.arange(config.n_experts, dtype=np.int32), (len(gone), 1))
  for layer, lost in enumerate(gone):
    if lost.any():
      one = jax.tree.map(lambda x, i=layer: x[i], params["experts"])
      distance = np.where(lost[None, :], np.inf, _distances(one))
      answers[layer, lost] = distance.argmin(axis=1)[lost]
  return Lost(jnp.zeros(gone.shape, bool), jnp.asarray(answers))


def _distances(experts: dict[str, Any]) -> np.ndarray:
  """Squared distances between all pairs, [E, E], of leaves [E, ...]."""
  leaves = [np.asarray(x, np.float32) for x in experts.values()]
  flat = [x.reshape(x.shape[0], -1) for x in leaves]
  products = sum((x @ x.T).astype(np.float64) for x in flat)
  norms = np.diag(products)
  return norms[:, None] + norms[None, :] - 2 * products


def _by_layer(config: ModelConfig, gone: np.ndarray) -> np.ndarray:
  """[L_moe, E] bool, with enough experts left in every layer."""
  gone = np.asarray(gone)
  e, layers = config.n_experts, config.moe_layers
  if gone.dtype != bool or gone.shape not in ((e,), (layers, e)):
    raise ValueError(
      f"gone: {gone.dtype} {gone.shape}; bool [E={e}] or "
      f"[L_moe={layers}, E={e}] is needed"
    )
  gone = np.broadcast_to(gone, (layers, e))
  left = int(e - gone.sum(axis=1).max())
  if left < config.top_k:
    raise ValueError(
      f"gone: {left} experts are left in a layer; at least "
      f"top_k={config.top_k} are needed"
    )
  return gone
