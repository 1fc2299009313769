"""Where a loaded model and the reference part: the first layer that differs."""

import dataclasses
from typing import Any

import jax
import numpy as np

from resilient_moe.model import ModelConfig, forward
from tests.third_party.reference import Reference


def first_difference(
  config: ModelConfig,
  params: dict[str, Any],
  reference: Reference,
  tokens: np.ndarray,
  tolerance: float,
) -> str:
  """A line that names the first layer whose output differs, and by how much.

  What leaves a layer is seen by a model that ends there and whose unembedding
  is the identity: its logits are that output, normalised.
  """
  wanted = reference.layers(tokens)
  for layer in range(config.n_layers - 1):  # the reference norms the last
    if all(config.is_dense(i) for i in range(layer + 1)):
      continue  # no such model
    seen = np.asarray(forward(*_until(config, params, layer), tokens))
    h = wanted[layer + 1].astype(np.float64)
    h /= np.sqrt((h * h).mean(-1, keepdims=True) + config.norm_eps)
    worst = np.abs(seen - h).max()
    if worst > tolerance:
      return f"layer {layer} differs first, by {worst:.2e}"
  return "no layer before the last one differs"


def _until(
  config: ModelConfig, params: dict[str, Any], layer: int
) -> tuple[ModelConfig, dict[str, Any]]:
  """The model up to a layer, with its hidden state for logits."""
  n = layer + 1
  cut = dataclasses.replace(
    config, n_layers=n, dense_layers=min(config.dense_layers, n),
    dense_at=tuple(i for i in config.dense_at if i < n),
    windows=config.windows[:n], tied_embeddings=False,
  )  # fmt: skip
  groups = [
    jax.tree.map(lambda x, n=n: x[:n], group)
    for group, (_, n) in zip(params["groups"], cut.groups(), strict=False)
  ]
  return cut, {
    **params,
    "groups": groups,
    "experts": jax.tree.map(lambda x: x[: cut.moe_layers], params["experts"]),
    "final_norm": np.ones(config.d_model, np.float32),
    "lm_head": np.eye(config.d_model, dtype=np.float32),
  }
