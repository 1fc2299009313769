"""Every choice of the public families keeps what serving promises.

Chunked prefill and decode have the bits of the whole pass, on any number of
ranks; latents and windows make caches and loops smaller, not other tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import (
  StepOptions,
  forward,
  load_checkpoint,
  save_checkpoint,
)
from resilient_moe.model.config import KERNEL_KINDS
from resilient_moe.model.forward import train_forward
from resilient_moe.model.params import describe
from resilient_moe.model.products import row_block
from resilient_moe.model.projections import attention_output, queries_and_kv
from resilient_moe.model.rope import turns
from resilient_moe.model.rows import rowwise
from resilient_moe.model.step import cache_shape
from tests.model.families import (
  CLIPPED,
  FAMILIES,
  LATENT,
  NORMS,
  SIGMOID,
  SINKS,
  narrow,
)
from tests.model.harness import (
  OPTIONS,
  Engine,
  Prompt,
  Token,
  fast_jit,
  skip_without_bits,
  tiny_params,
)

TEXT = np.random.default_rng(3).integers(0, 96, 33).astype(np.int32)
PREFILLED = 29  # chunks of 12, 12 and 5 tokens, then 4 steps of decode
# Every family on one rank; several ranks, whose programs take long to
# compile, for the choices that differ most.
CASES = [(name, 1) for name in FAMILIES]
CASES += [("norms", 3), ("sigmoid", 3), ("sinks", 7), ("sigmoid", 8)]


@functools.cache
def whole(name: str) -> np.ndarray:
  """Logits of the text in one pass, beside another text."""
  config = FAMILIES[name]
  batch = np.stack([TEXT[::-1], TEXT])
  return np.asarray(forward(config, tiny_params(config), batch, OPTIONS))[1]


@pytest.mark.parametrize(("name", "n_ranks"), CASES)
def test_chunks_and_decode_give_the_bits_of_forward(name, n_ranks):
  e = Engine(
    n_ranks, config=FAMILIES[name], copies=1, logical=n_ranks == 7
  )
  rank, row, width = n_ranks - 1, 1, OPTIONS.chunk
  for start in range(0, PREFILLED, width):
    part = tuple(TEXT[start : min(start + width, PREFILLED)].tolist())
    beside = [Token(rank, 2, 5 + start, start)]
    got = e.step([Prompt(rank, row, part, start), *beside])
    np.testing.assert_array_equal(
      got.logits[rank, -1], whole(name)[start + len(part) - 1]
    )
  for at in range(PREFILLED, len(TEXT)):
    got = e.step([Token(rank, row, int(TEXT[at]), at), Token(0, 0, 7, 2)])
    np.testing.assert_array_equal(got.logits[rank, row], whole(name)[at])


WIDE = {"d_model": 256, "n_heads": 8}
AS_WIDE_AS_PUBLISHED = {
  "head-norms": dataclasses.replace(NORMS, **WIDE, head_dim=128),
  "projection-norms": dataclasses.replace(CLIPPED, **WIDE, head_dim=64),
  "latent": dataclasses.replace(
    SIGMOID, **WIDE, q_rank=192, kv_rank=128, nope_dim=128, rope_dim=64,
    value_dim=128,
  ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", KERNEL_KINDS)
@pytest.mark.parametrize("name", AS_WIDE_AS_PUBLISHED)
def test_projections_have_the_same_bits_in_any_number_of_rows(
  name, kernels, rng
):
  skip_without_bits(kernels)
  c = AS_WIDE_AS_PUBLISHED[name]
  specs = describe(c)["groups"][-1]["attention"]
  w = {
    n: rng.standard_normal(s.shape[1:]).astype(np.float32) / 9
    for n, s in specs.items()
  }
  x = rng.standard_normal((70, c.d_model)).astype(np.float32)
  at = np.arange(70, dtype=np.int32)

  @fast_jit
  def both(w, x, at):  # as arguments: constants would be laid out otherwise
    options = StepOptions(kernels=kernels)
    block = row_block(options, x)
    before = lambda w, r: queries_and_kv(c, options, w, *r)
    after = lambda w, r: attention_output(c, options, w, r)
    q, kv = rowwise(before, w, (x, turns(at, c)), block)
    out = q[..., : c.kv_rank or c.head_dim]
    return q, kv, rowwise(after, w, out, block)

  want = both(w, x, at)
  for n in (1, 3, 16, 32, 47):
    for got, full in zip(both(w, x[:n], at[:n]), want, strict=True):
      np.testing.assert_array_equal(got, full[:n], f"{n} rows")


@pytest.mark.parametrize("name", FAMILIES)
def test_training_computes_what_serving_does(name):
  config = FAMILIES[name]
  params = jax.tree.map(jnp.asarray, tiny_params(config))
  run = fast_jit(lambda p: train_forward(config, p, TEXT[None])[0])
  np.testing.assert_allclose(run(params)[0], whole(name), rtol=0, atol=1e-4)


def test_a_cached_token_is_one_latent():
  assert cache_shape(SIGMOID, OPTIONS) == (3, 1, 3, 1, OPTIONS.cache_len, 20)
  assert SIGMOID.kv_heads * SIGMOID.kv_width == 20
  assert SIGMOID.expanded_kv_width == 4 * (6 + 4 + 8)
  assert NORMS.kv_heads * NORMS.kv_width == NORMS.expanded_kv_width == 2 * 2 * 8


@pytest.mark.parametrize("config", [LATENT, SINKS], ids=["latent", "sinks"])
def test_bfloat16_is_close_to_float32(config):
  """Norms, router and softmax stay in float32, so few choices differ."""
  exact = tiny_params(config)
  small = jax.tree.map(
    lambda x, y: x.astype(y.dtype), exact, tiny_params(narrow(config))
  )
  rounded = jax.tree.map(lambda x: x.astype(np.float32), small)
  batch = np.stack([TEXT[::-1], TEXT])  # as `whole`: the same program
  got = forward(narrow(config), small, batch, OPTIONS)
  want = np.asarray(forward(config, rounded, batch, OPTIONS))
  assert got.dtype == jnp.float32
  error = np.abs(np.asarray(got) - want).max(axis=-1)
  assert np.median(error) < 0.1 * want.std()


def test_bfloat16_on_three_ranks_has_the_bits_of_one():
  """So rounding is not where ranks differ."""
  prompt = Prompt(0, 1, tuple(TEXT[:12].tolist()))
  results = [
    Engine(n, config=narrow(SIGMOID), copies=1).step([prompt]) for n in (1, 3)
  ]
  first, second = (np.asarray(r.logits)[0, -1] for r in results)
  np.testing.assert_array_equal(first, second)
  first, second = (r.delta[:, 0, 3:15] for r in results)
  np.testing.assert_array_equal(first, second)


def test_checkpoint_keeps_biases_and_the_corrections_type(tmp_path):
  for config in (narrow(SIGMOID), SINKS):
    params = tiny_params(config)
    save_checkpoint(tmp_path / "saved", config, params)
    got_config, got = load_checkpoint(tmp_path / "saved")
    assert got_config == config
    jax.tree.map(np.testing.assert_array_equal, got, params)
    types = jax.tree.map(lambda x: x.dtype, got)
    assert types == jax.tree.map(lambda x: x.dtype, params)
