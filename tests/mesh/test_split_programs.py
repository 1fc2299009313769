"""A step that is cut at its experts has the bits of the whole one."""

import functools

import jax
import numpy as np
import pytest

from resilient_moe.mesh import programs, split_programs
from resilient_moe.model.step import batch_width
from tests.mesh import shapes

MODELS = {
  "plain": {},
  "dense-first": {"dense_layers": 1, "dense_width": 24, "shared_width": 16},
  "latent": {
    "attention": "mla", "kv_rank": 8, "nope_dim": 6, "rope_dim": 4,
    "value_dim": 5, "q_rank": 12, "router": "sigmoid_topk",
    "correction_bias": True, "expert_groups": 3, "top_groups": 2,
    "n_layers": 3, "dense_layers": 1, "dense_width": 24, "shared_width": 16,
  },
  "sinks": {
    "router": "topk_softmax", "router_bias": True, "sinks": True,
    "windows": (4, 0), "attention_bias": True, "expert_bias": True,
    "activation": "clamped_swiglu",
  },
}  # fmt: skip


@functools.cache
def compiled(shape, name: str):
  """One of the programs of a rank; only those that a test runs are needed."""
  device = jax.devices()[0]
  found = split_programs.lower_attention_programs(shape, device)
  found |= split_programs.lower_expert_programs(shape, device)
  return found[name]().compile()


def batch(shape, chunk: int) -> np.ndarray:
  """Both rows decode, and a chunk of 5 is prefilled."""
  options = shape.options
  b = options.rows
  ints = np.zeros((1, batch_width(options, chunk)), np.int32)
  ints[0, :b] = [7, 9]
  ints[0, b : 2 * b] = [3, -1] if chunk else [3, 6]
  if chunk:
    ints[0, 4 * b : 4 * b + 3] = 2, 5, 1
    ints[0, 4 * b + 5 : 4 * b + 10] = [1, 2, 3, 4, 5]
  return ints


def split_step(shape, params, cache, ints, chunk, experts, masked) -> tuple:
  """One attention rank and one expert rank with all experts, by hand."""
  config = shape.config
  ready = functools.partial(compiled, shape)
  midway, kv = ready(f"begin{chunk}")(params, cache, masked, ints)
  new = [kv]
  for layer in range(config.moe_layers):
    chosen = np.asarray(midway.chosen)
    assert not masked[chosen].any(), f"layer {layer}"
    n, k = chosen.shape
    bucket = next(m for m in split_programs.buckets(shape) if m >= n * k)
    rows = np.zeros((bucket, config.d_model), np.float32)
    rows[:n] = midway.h
    token, slot = np.zeros(bucket, np.int32), np.full(bucket, shape.slots)
    token[: n * k] = np.arange(n * k) // k
    slot[: n * k] = chosen.reshape(-1)
    y = ready(f"experts{bucket}")(
      experts, np.int32(layer), rows, token, slot.astype(np.int32)
    )
    y = np.asarray(y)[: n * k].reshape(n, k, -1)
    if layer + 1 < config.moe_layers:
      midway, kv = ready(f"go_on{chunk}")(
        params, cache, masked, ints, np.int32(layer + 1), midway.x,
        midway.gates, y,
      )  # fmt: skip
      new.append(kv)
  return ready(f"finish{chunk}")(
    params, ints, midway.x, midway.gates, y, tuple(new)
  )


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("model", MODELS)
def test_bits_are_those_of_the_whole_step(chunk, model):
  shape = shapes.instance_of(slots=6, **MODELS[model])
  params, cache, routing, _ = shapes.values(shape, 1, chunk)
  ints = batch(shape, chunk)
  # Unhidden, it would be among the choices of some lane in every layer.
  masked = np.arange(shape.config.n_experts) == 1
  routing = {**routing, "masked": masked}
  whole = programs.lower_step(shape, jax.devices()[:1], chunk).compile()
  delta, tokens = whole(params, cache, routing, ints)
  dense = {name: value for name, value in params.items() if name != "experts"}
  experts = params["experts"]
  got, said = split_step(shape, dense, cache, ints, chunk, experts, masked)
  lanes = [0, *range(2, 7)] if chunk else [0, 1]
  np.testing.assert_array_equal(
    np.asarray(got)[:, :, lanes], np.asarray(delta)[:, :, lanes]
  )
  live = [0, 2] if chunk else [0, 1]
  np.testing.assert_array_equal(
    np.asarray(said)[0, live], np.asarray(tokens)[0, live]
  )


def test_dense_layers_between_the_others_are_one_clear_error():
  shape = shapes.instance_of(2, n_layers=3, dense_at=(1,), dense_width=8)
  with pytest.raises(ValueError, match=r"dense_at=\(1,\): a disaggregated"):
    split_programs.lower_attention_programs(shape, jax.devices()[0])
