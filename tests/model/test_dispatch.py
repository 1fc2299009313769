"""Every dispatch x every expert kernel, by `shard_map` and as logical ranks.

Results are compared bit for bit over strategies and numbers of ranks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from resilient_moe.mesh import make_mesh
from resilient_moe.model import StepOptions
from resilient_moe.model.config import DISPATCHES, EXPERT_KERNELS, ModelConfig
from resilient_moe.model.dispatch import AXIS, make_exchange, round_size
from tests.model import expert_cases as cases
from tests.model.harness import fast_jit

SIZES = (1, 2, 3, 5, 8)


def exchange(n_ranks: int, dispatch: str, kernel: str):
  """One rank's function of its experts [L, 1, S, ...], x and slots [1, ...]."""
  options = StepOptions(dispatch=dispatch, experts=kernel)
  do = make_exchange(ModelConfig(), options, n_ranks)

  def one_rank(experts, x, to):
    mine = jax.tree.map(lambda w: w[:, 0], experts)
    return do(mine, jnp.int32(cases.LAYER), x[0], to[0])[None]

  return one_rank


def sharded(n_ranks: int, dispatch: str, kernel: str):
  # On one rank there is nothing to dispatch: one program for all strategies.
  return _sharded(n_ranks, dispatch if n_ranks > 1 else DISPATCHES[0], kernel)


@functools.cache
def _sharded(n_ranks: int, dispatch: str, kernel: str):
  by_rank = (P(None, AXIS), P(AXIS), P(AXIS))
  return fast_jit(
    jax.shard_map(
      exchange(n_ranks, dispatch, kernel), in_specs=by_rank,
      mesh=make_mesh(jax.devices()[:n_ranks]), out_specs=P(AXIS),
      check_vma=False,
    )
  )  # fmt: skip


@functools.cache
def logical(n_ranks: int, dispatch: str, kernel: str):
  one_rank = exchange(n_ranks, dispatch, kernel)

  def alone(experts, x, to):
    wide = jax.tree.map(lambda w: w[:, None], experts)
    return one_rank(wide, x[None], to[None])[0]

  return fast_jit(jax.vmap(alone, in_axes=(1, 0, 0), axis_name=AXIS))


def compute(run, slots, x, to) -> np.ndarray:
  return np.asarray(run(cases.stacks(slots), x, to.astype(np.int32)))


@pytest.mark.parametrize("n_ranks", SIZES)
class TestDispatch(cases.ExpertTests):
  """The shared tests for every strategy with the serving kernel."""

  @pytest.fixture(params=DISPATCHES)
  def way(self, request):
    return request.param

  def outputs(self, way, slots, x, to):
    return compute(sharded(len(x), way, "blocks"), slots, x, to)


@pytest.mark.parametrize("n_ranks", [3])
class TestEveryKernel(cases.ExpertTests):
  """And for every pair of a strategy and another kernel."""

  @pytest.fixture(
    params=[(d, k) for d in DISPATCHES for k in EXPERT_KERNELS if k != "blocks"]
  )
  def way(self, request):
    return request.param

  def outputs(self, way, slots, x, to):
    return compute(sharded(len(x), *way), slots, x, to)


@pytest.mark.parametrize("n_ranks", [3])
class TestLogicalRanks(cases.ExpertTests):
  @pytest.fixture(params=DISPATCHES)
  def way(self, request):
    return request.param

  def outputs(self, way, slots, x, to):
    return compute(logical(len(x), way, "blocks"), slots, x, to)


def test_strategies_and_numbers_of_ranks_agree_bit_for_bit(rng):
  """The same 40 tokens, first on one rank, then beside others."""
  x = cases.tokens(8, cases.TOKENS)
  experts = cases.choices(rng, 8, cases.TOKENS)["any"]
  expected = None
  for n_ranks in SIZES:
    slots = cases.place(n_ranks, rng)
    to = cases.seat(experts[:n_ranks], slots, rng)
    for dispatch in DISPATCHES:
      run = sharded(n_ranks, dispatch, "blocks")
      got = compute(run, slots, x[:n_ranks], to)
      expected = got[0] if expected is None else expected
      np.testing.assert_array_equal(got[0], expected)
  slots = cases.place(3, rng)
  to = cases.seat(experts[:3], slots, rng)
  for dispatch in DISPATCHES:
    got = compute(logical(3, dispatch, "blocks"), slots, x[:3], to)
    np.testing.assert_array_equal(got[0], expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("n_ranks", SIZES)
def test_everybody_wants_two_experts_of_one_rank(n_ranks, dispatch, rng):
  """As uneven as it can be: no token is dropped, in as many rounds."""
  slots, x = cases.place(n_ranks, rng), cases.tokens(n_ranks, cases.TOKENS)
  rank = max(range(n_ranks), key=lambda r: len(set(slots[r]) - {-1}))
  experts, seats = np.unique(slots[rank], return_index=True)
  seats = seats[experts >= 0][:2] + rank * slots.shape[1]
  to = np.tile(seats.astype(np.int32), (*x.shape[:2], 1))
  got = compute(sharded(n_ranks, dispatch, "blocks"), slots, x, to)
  want = cases.reference(x, slots.reshape(-1)[to])
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_decode_step_is_one_round_whoever_is_wanted(rng):
  """Sized for the worst case: every token to one rank still fits."""
  assert round_size(4, 2, held=2, n_ranks=8) == 8
  slots, x = cases.place(3, rng), cases.tokens(3, 4)
  experts = np.full((3, 4, 2), 4)
  experts[..., 1] = 5
  to = cases.seat(experts, slots, rng)
  run = sharded(3, "all_to_all", "blocks")
  got = compute(run, slots, x, to)
  np.testing.assert_allclose(got, cases.reference(x, experts), atol=1e-5)
  text = run.lower(cases.stacks(slots), x, to.astype(np.int32)).as_text()
  assert "all_reduce" not in text  # nobody asks how many rounds there are


@pytest.mark.parametrize("n_ranks", SIZES[1:])
def test_large_steps_take_several_small_rounds(n_ranks):
  n, k, held = cases.TOKENS, cases.K, cases.held(n_ranks)
  size = round_size(n, k, held, n_ranks)
  assert n * k / n_ranks <= size <= n * k
  if n_ranks > 2:
    assert size < n * k  # so that the tests above need more than one round
