"""The native kernels by themselves: products, what is rare, the library."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import ModelConfig, StepOptions, native
from resilient_moe.model.experts import kernel_of
from resilient_moe.model.native import library
from resilient_moe.model.products import Stacked, is_native, matmul
from tests.model.harness import fast_jit

pytestmark = pytest.mark.skipif(
  bool(native.register()), reason="no compiler for the native kernels"
)


@pytest.mark.parametrize("round_", range(6))
def test_products_are_those_of_float64_whatever_the_shape(round_, rng):
  """Widths that fill no vector, no panel; rows few, packed, and for nobody."""
  m, k = int(rng.integers(1, 300)), int(rng.integers(1, 300))
  n, groups = int(rng.integers(1, 200)), int(rng.integers(1, 5))
  x = rng.standard_normal((m, k)).astype(np.float32)
  w = rng.standard_normal((groups, k, n)).astype(np.float32)
  slot = rng.integers(-1, groups + 1, m).astype(np.int32)
  got = np.asarray(fast_jit(native.grouped_matmul)(x, w, slot))
  held = (slot >= 0) & (slot < groups)
  wide = w.astype(np.float64)[np.where(held, slot, 0)]
  want = np.einsum("mk,mkn->mn", x.astype(np.float64), wide)
  np.testing.assert_allclose(got[held], want[held], atol=2e-5 * np.sqrt(k))
  assert (got[~held] == 0).all()


def test_rows_have_the_same_bits_in_any_number_and_company(rng):
  """1 to 6 rows are one tile, 128 and more go over a packed block."""
  x = rng.standard_normal((300, 96)).astype(np.float32)
  w = rng.standard_normal((2, 96, 150)).astype(np.float32)
  slot = rng.integers(0, 2, 300).astype(np.int32)
  whole = np.asarray(native.grouped_matmul(x, w, slot))
  for n in (1, 2, 6, 7, 31, 32, 33, 127, 128, 200):
    rows = rng.permutation(300)[:n]
    part = np.asarray(native.grouped_matmul(x[rows], w, slot[rows]))
    np.testing.assert_array_equal(part, whole[rows], f"{n} rows")


def test_a_product_is_whole_when_its_call_returns(rng):
  """Also where another thread has its last piece still to do."""
  w = rng.standard_normal((1, 512, 4096)).astype(np.float32)
  slot = np.zeros(64, np.int32)
  for _ in range(8):
    x = rng.standard_normal((64, 512)).astype(np.float32)
    got = np.asarray(native.grouped_matmul(x, w, slot))
    np.testing.assert_allclose(got, x @ w[0], atol=1e-3)


def test_a_stacked_matrix_is_read_where_it_lies(rng):
  x = rng.standard_normal((5, 24)).astype(np.float32)
  stack = rng.standard_normal((3, 24, 40)).astype(np.float32)
  one = lambda x, w: matmul(StepOptions(), x, w)
  got = fast_jit(lambda: one(x, Stacked(stack, jnp.int32(2))))()
  np.testing.assert_array_equal(got, fast_jit(lambda: one(x, stack[2]))())
  np.testing.assert_allclose(got, x @ stack[2], atol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_are_those_of_xla(activation, biased, rng):
  """Also where a gate is far outside of what the exponential can hold."""
  d, f, slots, m = 20, 37, 3, 64
  draw = lambda *s: rng.standard_normal((2, slots, *s)).astype(np.float32)
  experts = {"gate_up": draw(d, 2 * f) * 9, "down": draw(f, d)}
  if biased:
    experts |= {"gate_up_bias": draw(2 * f) * 50, "down_bias": draw(d)}
  x = rng.standard_normal((10, d)).astype(np.float32)
  token = rng.integers(0, 10, m).astype(np.int32)
  slot = rng.integers(0, slots + 1, m).astype(np.int32)
  config = ModelConfig(
    activation=activation, swiglu_limit=7.0, swiglu_alpha=1.702
  )

  def run(kernels):
    kernel = kernel_of(config, StepOptions(kernels=kernels))
    call = fast_jit(lambda: kernel(experts, jnp.int32(1), x, token, slot))
    return np.asarray(call())

  want = run("xla")
  np.testing.assert_allclose(
    run("native"), want, rtol=2e-5, atol=2e-5 * np.abs(want).max()
  )
  assert (run("native")[slot == slots] == 0).all()


# While the call is dispatched, or when its result is waited for.
REFUSED = (ValueError, jax.errors.JaxRuntimeError)


def attend(rng, start, length, layer=0):
  """Two sequences of 6 queries, over a cache of 2 layers and 16 positions."""
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  ints = lambda x: jnp.asarray(x, jnp.int32)
  return native.attend(
    draw(2, 6, 4, 8), draw(2, 6, 4, 8), draw(2, 2, 4, 16, 8), ints(layer),
    ints(0), ints(start), ints(length), jnp.zeros(0), ints(0),
    latent=0, block=8,
  )  # fmt: skip


def test_queries_that_do_not_count_give_zero(rng):
  """In memory that held something else."""
  for _ in range(3):
    assert np.asarray(attend(rng, [5, 9], [6, 6])).all()
    out = np.asarray(attend(rng, [5, 9], [4, 0]))
    assert out[0, :4].all()
    assert not out[0, 4:].any()
    assert not out[1].any()


def test_nothing_is_read_outside_of_the_cache(rng):
  attend(rng, [16, 99], [6, 0])  # behind its end there are the new tokens
  with pytest.raises(REFUSED, match="start=17: .*16"):
    jax.block_until_ready(attend(rng, [3, 17], [1, 1]))
  for layer in (-1, 2):
    with pytest.raises(REFUSED, match=f"layer={layer}: "):
      jax.block_until_ready(attend(rng, [3, 4], [1, 1], layer))
  stacks = {"gate_up": jnp.ones((2, 3, 8, 8)), "down": jnp.ones((2, 3, 4, 8))}
  one = jnp.zeros(1, jnp.int32)
  for layer in (-1, 2):
    with pytest.raises(REFUSED, match=f"layer={layer}: "):
      jax.block_until_ready(
        native.experts(
          stacks, jnp.int32(layer), jnp.ones((1, 8)), one, one, 0.0, 1.0
        )
      )


def test_other_types_are_left_to_xla():
  half, whole = jnp.zeros((2, 2), jnp.bfloat16), jnp.zeros((2, 2))
  assert is_native(StepOptions(), whole)
  assert not is_native(StepOptions(), whole, half)
  assert not is_native(StepOptions(kernels="xla"), whole)
  assert matmul(StepOptions(), half, half).dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms_call_no_kernel(platform):
  """A program may be lowered on a host whose own platform has them."""
  x, w = jnp.zeros((4, 8)), jnp.zeros((8, 8))
  call = jax.jit(lambda x, w: matmul(StepOptions(), x, w))
  assert "rmoe_" in call.lower(x, w).as_text()
  there = call.trace(x, w).lower(lowering_platforms=(platform,))
  assert "rmoe_" not in there.as_text()


def test_no_compiler_is_said_and_leaves_nothing(monkeypatch, tmp_path, caplog):
  monkeypatch.setenv("RMOE_NATIVE_CACHE", str(tmp_path / "kernels"))
  monkeypatch.setenv("CXX", "no-such-compiler")
  with caplog.at_level(logging.WARNING):
    why = library.register.__wrapped__()
  assert "no-such-compiler" in why
  assert "XLA's own code" in caplog.text
  assert list((tmp_path / "kernels").iterdir()) == []


def test_what_the_compiler_says_is_passed_on(monkeypatch, tmp_path):
  monkeypatch.setenv("RMOE_NATIVE_CACHE", str(tmp_path))
  monkeypatch.setattr(library, "_FLAGS", ("-std=c++17", "-no-such-flag"))
  assert "no-such-flag" in library.register.__wrapped__()


def test_sources_flags_and_compiler_each_have_their_own_library(monkeypatch):
  first = library._digest(["c++", "-O3"])
  assert library._digest(["c++", "-O3"]) == first
  assert library._digest(["clang++", "-O3"]) != first
  monkeypatch.setattr(library, "_processor", lambda: "another")
  assert library._digest(["c++", "-O3"]) != first
