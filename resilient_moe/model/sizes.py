"""What a model weighs, from its config alone: nothing is allocated."""

import dataclasses

import jax
import numpy as np

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.params import (
  ParamSpec,
  count_params,
  describe,
  is_spec,
)


@dataclasses.dataclass(frozen=True)
class ModelSize:
  """Numbers and bytes of a model."""

  params: int  # all of them
  active_params: int  # that compute one token, input embedding left out
  embedding_params: int  # the table that a token's row is read from
  dense_bytes: int  # everything but routed experts: what every rank holds
  expert_bytes: int  # one routed expert, all layers: what a slot holds
  token_kv_bytes: int  # what is cached of a token, all layers
  expanded_token_kv_bytes: int  # its keys and values, were they not compressed


def model_size(config: ModelConfig) -> ModelSize:
  """The sizes of a model.

  A tied embedding is read as the output head too and counts as active.
  """
  specs = jax.tree.leaves(describe(config), is_leaf=is_spec)
  experts = [spec for spec in specs if spec.is_expert]
  routed, embedding = _numbers(experts), config.vocab_size * config.d_model
  params, share = count_params(config), routed // config.n_experts
  active = params - routed + config.top_k * share
  item = np.dtype(config.dtype).itemsize
  cached = config.n_layers * config.kv_heads * config.kv_width
  return ModelSize(
    params=params,
    active_params=active - (0 if config.tied_embeddings else embedding),
    embedding_params=embedding,
    dense_bytes=sum(spec.nbytes for spec in specs if not spec.is_expert),
    expert_bytes=sum(spec.nbytes for spec in experts) // config.n_experts,
    token_kv_bytes=cached * item,
    expanded_token_kv_bytes=(
      config.n_layers * config.expanded_kv_width * item
    ),
  )


def _numbers(specs: list[ParamSpec]) -> int:
  return sum(int(np.prod(spec.shape)) for spec in specs)
