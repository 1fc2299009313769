"""The expert kernels by themselves: one rank, no collective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model.config import (
  EXPERT_KERNELS,
  ModelConfig,
  StepOptions,
)
from resilient_moe.model.experts import KERNELS, _plan, block_size, kernel_of
from tests.model import expert_cases as cases
from tests.model.harness import fast_jit

WAYS = {
  "native": StepOptions(),
  "blocks": StepOptions(kernels="xla"),
  "static": StepOptions(experts="static"),
}


@functools.partial(fast_jit, static_argnames=("way",))
def run(experts, x, token, slots, way):
  kernel = kernel_of(ModelConfig(), WAYS[way])
  return kernel(experts, jnp.int32(cases.LAYER), x, token, slots)


def assignments(to: np.ndarray, n_slots: int):
  """[N, k] slots -> token [N k], slots with n_slots for none."""
  token = np.arange(to.size, dtype=np.int32) // to.shape[1]
  flat = np.where(to >= 0, to, n_slots).astype(np.int32)
  return token, flat.reshape(-1)


def test_the_config_names_the_kernels_that_exist():
  assert tuple(KERNELS) == EXPERT_KERNELS


@pytest.mark.parametrize("n_ranks", [1])
class TestKernels(cases.ExpertTests):
  @pytest.fixture(params=WAYS)
  def way(self, request):
    return request.param

  def outputs(self, way, slots, x, to):
    experts = jax.tree.map(lambda w: w[:, 0], cases.stacks(slots))
    token, flat = assignments(to[0], slots.size)
    y = run(experts, x[0], token, flat, way)
    return np.asarray(y).reshape(*to.shape, -1)


@pytest.mark.parametrize("way", ["native", "blocks"])
def test_an_assignment_has_the_same_bits_in_any_number(way, rng):
  """Few assignments run in blocks of 8, many in blocks of 32."""
  slots = cases.place(1, rng)
  experts = jax.tree.map(lambda w: w[:, 0], cases.stacks(slots))
  x = np.tile(cases.tokens(1, cases.TOKENS)[0], (2, 1))
  choice = cases.choices(rng, 1, len(x))["any"][0]
  token, flat = assignments(cases.seat(choice, slots, rng), slots.size)
  assert block_size(len(flat), 0) == 32
  whole = run(experts, x, token, flat, way)
  for n in (1, 60):
    part = run(experts, x, token[:n], flat[:n], way)
    np.testing.assert_array_equal(part, whole[:n])


def test_rows_of_empty_slots_are_never_computed(rng):
  """NaN in an unused slot reaches nobody, in no kernel's forward pass."""
  slots = cases.place(1, rng)
  experts = jax.tree.map(lambda w: w[:, 0], cases.stacks(slots))
  assert np.isnan(experts["down"]).any()
  to = np.full((cases.TOKENS, cases.K), -1, np.int32)
  to[:9, 0] = np.flatnonzero(slots.reshape(-1) == 3)[0]
  token, flat = assignments(to, slots.size)
  for way in WAYS:
    y = run(experts, cases.tokens(1, cases.TOKENS)[0], token, flat, way)
    assert np.isfinite(y).all(), way


def test_cost_grows_with_the_rows_and_not_with_the_experts_held(rng):
  """The block loop's trip count, by its definition of a plan."""
  for held in (8, 256):
    slots = rng.integers(0, 8, 64).astype(np.int32)
    plan = fast_jit(functools.partial(_plan, n_slots=held, block=8))
    blocks = int(plan(slots)[-1][-1])
    counts = np.bincount(slots)
    assert blocks == (-(-counts // 8)).sum() <= 64 // 8 + 8


def test_static_kernel_has_the_gradient_of_the_reference(rng):
  gate_up, down = map(jnp.asarray, cases.weights())
  experts = {"gate_up": gate_up, "down": down}
  x = jnp.asarray(cases.tokens(1, 6)[0])
  choice = rng.integers(0, cases.E, (6, 1)).astype(np.int32)
  token, flat = map(jnp.asarray, assignments(choice, cases.E))

  def loss(x, down, compute):
    return (compute(x, {**experts, "down": down}) ** 2).sum()

  def static(x, experts):
    layer = jnp.int32(cases.LAYER)
    return KERNELS["static"](experts, layer, x, token, flat)

  def plain(x, experts):
    gate, up = jnp.split(
      jnp.einsum("nd,ndf->nf", x, experts["gate_up"][cases.LAYER][flat]),
      2, axis=1,
    )  # fmt: skip
    w = experts["down"][cases.LAYER][flat]
    return jnp.einsum("nf,nfd->nd", jax.nn.silu(gate) * up, w)

  grad = fast_jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
  got, want = (grad(x, down, f) for f in (static, plain))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def _while_bodies(jaxpr):
  """The jaxprs of loops directly inside `jaxpr`, calls looked through."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "while":
      yield equation.params["body_jaxpr"].jaxpr
      continue
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", None)
      if inner is not None:
        yield from _while_bodies(inner)


def test_weights_are_copied_once_a_slot_and_not_once_a_block(rng):
  experts = jax.tree.map(lambda w: w[:, 0], cases.stacks(np.arange(4)[None]))
  d = experts["down"].shape[-1]
  x = rng.standard_normal((6, d)).astype(np.float32)
  token, slots = assignments(rng.integers(0, 4, (6, 2)), 4)
  kernel = functools.partial(KERNELS["blocks"], fixed_block=8)
  traced = jax.make_jaxpr(kernel)(experts, jnp.int32(0), x, token, slots)
  (slot_loop,) = _while_bodies(traced.jaxpr)
  (block_loop,) = _while_bodies(slot_loop)
  copies = lambda jaxpr: [
    equation
    for equation in jaxpr.eqns
    if equation.primitive.name == "dynamic_slice"
    and equation.invars[0].aval.ndim == 4
  ]
  assert len(copies(slot_loop)) == 2
  assert not copies(block_loop)
