"""One reference and one test base for every dispatch and expert kernel.

A subclass says how assignments get computed (`outputs`); the cases, the
reference and the tests are the same for all.
"""

import functools

import numpy as np
import pytest

D, F, L, LAYER = 32, 24, 2, 1
E, K = 7, 2
TOKENS = 40  # of each rank: more than one all-to-all round carries

Slots = np.ndarray  # [R, N, k] int32 global slots, -1: none


def weights() -> tuple[np.ndarray, np.ndarray]:
  """gate_up [L, E, D, 2F], down [L, E, F, D]."""
  rng = np.random.default_rng(7)
  gate_up = rng.standard_normal((L, E, D, 2 * F)) / np.sqrt(D)
  down = rng.standard_normal((L, E, F, D)) / np.sqrt(F)
  return gate_up.astype(np.float32), down.astype(np.float32)


@functools.cache
def tokens(n_ranks: int, n: int) -> np.ndarray:
  """[R, N, D]; a shorter or narrower draw is a part of a larger one."""
  x = np.random.default_rng(8).standard_normal((8, TOKENS, D))
  return x[:n_ranks, :n].astype(np.float32)


def reference(x: np.ndarray, experts: np.ndarray) -> np.ndarray:
  """Each token through each of its experts, one by one: [..., k, D]."""
  gate_up, down = (w[LAYER].astype(np.float64) for w in weights())
  out = np.zeros((*experts.shape, D))
  for index in np.ndindex(*experts.shape):
    if (e := experts[index]) >= 0:
      gate, up = np.split(x[index[:-1]].astype(np.float64) @ gate_up[e], 2)
      out[index] = (gate / (1 + np.exp(-gate)) * up) @ down[e]
  return out


def held(n_ranks: int) -> int:
  """Slots of a rank: for two copies of each expert, and one to spare."""
  return -(-2 * E // n_ranks) + 1


def place(n_ranks: int, rng) -> np.ndarray:
  """Expert in each slot, [R, S], in random order; -1: empty."""
  seats = rng.permutation(n_ranks * held(n_ranks))
  slots = np.full(n_ranks * held(n_ranks), -1, np.int32)
  slots[seats[:E]], slots[seats[E : 2 * E]] = np.arange(E), np.arange(E)
  return slots.reshape(n_ranks, -1)


def stacks(slots: np.ndarray) -> dict[str, np.ndarray]:
  """Weights in slots, [L, R, S, ...]; what no expert holds is NaN."""

  def stack(w: np.ndarray) -> np.ndarray:
    out = w[:, np.maximum(slots, 0)]
    return np.where((slots < 0)[None, :, :, None, None], np.nan, out)

  gate_up, down = weights()
  return {"gate_up": stack(gate_up), "down": stack(down)}


def seat(experts: np.ndarray, slots: np.ndarray, rng) -> np.ndarray:
  """A slot for each choice, any of the replicas; -1 stays."""
  copies = [np.flatnonzero(slots.reshape(-1) == e) for e in range(E)]
  pick = lambda e: rng.choice(copies[e]) if e >= 0 else -1
  return np.vectorize(pick, otypes=[np.int32])(experts)


def choices(rng, n_ranks: int, n: int) -> dict[str, np.ndarray]:
  """Which experts the tokens want, [R, N, k], by what is special in it."""
  shape = (n_ranks, n)
  any_two = rng.permuted(np.tile(np.arange(E), (*shape, 1)), axis=2)[..., :K]
  lonely = np.stack([np.full(shape, 4), np.full(shape, -1)], axis=2)
  some = np.where(rng.random((*shape, K)) < 0.5, any_two, -1)
  one_rank = np.where((np.arange(n_ranks) == 0)[:, None, None], any_two, -1)
  return {
    "any": any_two,
    "all-to-one": lonely,  # no token is dropped
    "some-none": some,
    "one-rank-only": one_rank,
    "none": np.full_like(any_two, -1),
  }


class ExpertTests:
  """The tests. Subclasses give `outputs` and the fixture `way`."""

  def outputs(self, way, slots: np.ndarray, x: np.ndarray, to: Slots):
    """[R, N, k, D] from tokens [R, N, D] and their slots [R, N, k]."""
    raise NotImplementedError

  @pytest.mark.parametrize(
    "case", ["any", "all-to-one", "some-none", "one-rank-only", "none"]
  )
  def test_each_token_gets_its_experts(self, way, n_ranks, case, rng):
    x = tokens(n_ranks, TOKENS)
    experts = choices(rng, n_ranks, TOKENS)[case]
    slots = place(n_ranks, rng)
    got = self.outputs(way, slots, x, seat(experts, slots, rng))
    np.testing.assert_allclose(got, reference(x, experts), atol=1e-5)
    assert (got[experts < 0] == 0).all()

  def test_placement_and_replica_change_no_bit(self, way, n_ranks, rng):
    x = tokens(n_ranks, TOKENS)
    experts = choices(rng, n_ranks, TOKENS)["any"]
    results = []
    for _ in range(2):
      slots = place(n_ranks, rng)
      results.append(self.outputs(way, slots, x, seat(experts, slots, rng)))
    np.testing.assert_array_equal(*results)

  def test_companions_change_no_bit(self, way, n_ranks, rng):
    x = tokens(n_ranks, TOKENS)
    experts = choices(rng, n_ranks, TOKENS)["any"]
    slots = place(n_ranks, rng)
    to = seat(experts, slots, rng)
    whole = self.outputs(way, slots, x, to)
    few = np.where(rng.random(to.shape[:2]) < 0.2, 1, 0)[:, :, None] > 0
    got = self.outputs(way, slots, x, np.where(few, to, -1))
    few = np.broadcast_to(few, to.shape)
    np.testing.assert_array_equal(got[few], whole[few])
