"""What a request gets doesn't depend on where and beside whom it is served.

All comparisons are bit for bit, except where an option declares that it
doesn't keep bits.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from resilient_moe.model import forward
from tests.model import harness
from tests.model.harness import OPTIONS, TINY, Engine, Prompt, Token

PROMPT = tuple(int(t) for t in np.random.default_rng(5).integers(1, 96, 25))
DECODED = 6  # the prompt's three chunks are 12, 12 and 1 tokens wide

CASES: dict[str, dict[str, Any]] = {
  "1": {"n_ranks": 1},
  "3": {"n_ranks": 3},
  "7": {"n_ranks": 7},
  "8": {"n_ranks": 8},
  "8-gather": {"n_ranks": 8, "dispatch": "all_gather"},
  "3-logical": {"n_ranks": 3, "logical": True},
  "1-xla": {"n_ranks": 1, "kernels": "xla"},
  "7-xla": {"n_ranks": 7, "kernels": "xla"},
  "3-logical-xla": {"n_ranks": 3, "logical": True, "kernels": "xla"},
}


# Texts are padded, so that one program serves every length.
BESIDE = np.arange(1, len(PROMPT) + DECODED + 1, dtype=np.int32)


@functools.cache
def engine(case: str) -> Engine:
  """One engine a case: its programs are compiled once for all tests."""
  return Engine(**CASES[case])


@functools.cache
def expected(
  kernels: str = "native",
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
  """Greedy text, the logits that `forward` gives it, KV of a re-prefill."""
  text = PROMPT
  for _ in range(DECODED):
    logits = logits_of(text, kernels)
    text = (*text, int(logits[-1].argmax()))
  one = engine("1" if kernels == "native" else f"1-{kernels}")
  one.prefill(Prompt(0, 0, text))
  kv = one.kv(0, 0, len(text))
  one.reset()  # leaves nothing that a wrong row could find
  return text, logits_of(text, kernels), kv


def logits_of(text: tuple[int, ...], kernels: str) -> np.ndarray:
  """From `forward`, as rows of several blocks, beside another text."""
  batch = np.stack([np.zeros_like(BESIDE), BESIDE])
  batch[0, : len(text)] = text
  tokens = jnp.asarray(batch)
  options = dataclasses.replace(OPTIONS, kernels=kernels)
  logits = forward(TINY, harness.tiny_params(), tokens, options)
  return np.asarray(logits)[0, : len(text)]


def serve(e: Engine, rank: int, row: int, companions=lambda step: ()):
  """Prefill and teacher-forced decode; logits by position, and the KV."""
  text, _, _ = expected(e.options.kernels)
  rows, width, step = {}, e.options.chunk, 0
  for start in range(0, len(PROMPT), width):
    part = PROMPT[start : start + width]
    result = e.step([Prompt(rank, row, part, start), *companions(step)])
    rows[start + len(part) - 1] = result.logits[rank, -1]
    step += 1
  for at in range(len(PROMPT), len(text)):
    result = e.step([Token(rank, row, text[at], at), *companions(step)])
    rows[at] = result.logits[rank, row]
    step += 1
  return rows, e.kv(rank, row, len(text))


def check(e: Engine, rows: dict[int, np.ndarray], kv: np.ndarray) -> None:
  _, logits, prefilled = expected(e.options.kernels)
  for position, row in rows.items():
    np.testing.assert_array_equal(row, logits[position], f"at {position}")
  np.testing.assert_array_equal(kv, prefilled)


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_decode_give_the_bits_of_forward(case):
  e = engine(case)
  e.reset()
  check(e, *serve(e, rank=e.n_ranks - 1, row=1))


@pytest.mark.parametrize("case", CASES)
def test_place_and_companions_change_no_bit(case, rng):
  e = engine(case)
  for copies in (1, 2):
    e.place(_random_entries(rng, e, copies))
    e.reset()
    rank, row = int(rng.integers(e.n_ranks)), int(rng.integers(3))
    check(e, *serve(e, rank, row, _random_companions(rng, e, rank, row)))
  e.place(harness.placement(e.n_ranks, e.shape.slots))


def _random_entries(rng, e: Engine, copies: int) -> np.ndarray:
  """Every expert in `copies` slots anywhere, some with fewer."""
  seats = rng.permutation(e.n_ranks * e.shape.slots)
  seats = seats[: TINY.n_experts * copies].reshape(TINY.n_experts, copies)
  entries = np.stack([seats // e.shape.slots, seats % e.shape.slots], axis=2)
  if copies > 1:
    entries[rng.integers(TINY.n_experts), 1] = -1
  return entries.astype(np.int32)


def _random_companions(rng, e: Engine, rank: int, row: int):
  """Other rows decode or prefill anything, anew at every step."""

  def companions(_):
    work = []
    for r in range(e.n_ranks):
      if r != rank and rng.random() < 0.4:
        n = int(rng.integers(1, e.options.chunk + 1))
        tokens = tuple(int(t) for t in rng.integers(0, 96, n))
        work.append(Prompt(r, 2, tokens, int(rng.integers(0, 20)), 1, 0.7))
      for b in range(2):
        if (r, b) != (rank, row) and rng.random() < 0.6:
          token, at = int(rng.integers(0, 96)), int(rng.integers(0, 40))
          work.append(Token(r, b, token, at, 3, 0.9))
    return work

  return companions


def test_logical_and_sharded_steps_return_equal_deltas(rng):
  text = tuple(int(t) for t in rng.integers(0, 96, 12))
  work = [Prompt(0, 0, text), Prompt(2, 1, text[:5]), Token(1, 2, 7, 0)]
  sharded, logical = engine("3"), engine("3-logical")
  results = []
  for e in (sharded, logical):
    e.reset()
    results.append(e.step(work))
  first, second = results
  lanes = first.delta.shape[2]
  live = np.zeros((3, lanes), bool)
  live[0, 3:15], live[2, 3:8], live[1, 2] = True, True, True
  for r, lane in np.argwhere(live):
    np.testing.assert_array_equal(
      first.delta[:, r, lane], second.delta[:, r, lane]
    )
  for r, place in ((0, -1), (2, -1), (1, 2)):
    np.testing.assert_array_equal(
      first.logits[r, place], second.logits[r, place]
    )
    assert first.tokens[r, place] == second.tokens[r, place]


def test_step_that_fails_changes_nothing_and_runs_again_the_same():
  e = engine("3")
  e.reset()
  e.prefill(Prompt(1, 1, PROMPT[:12]))
  work = [Prompt(1, 1, PROMPT[12:20], 12), Token(2, 0, 5, 0, 1, 0.8)]
  before = np.asarray(e.cache).copy()
  failed = e.step(work, commit=False)
  np.testing.assert_array_equal(np.asarray(e.cache), before)
  again = e.step(work)
  after = np.asarray(e.cache).copy()
  assert not np.array_equal(after, before)
  twice = e.step(work)  # committed before, and run again
  np.testing.assert_array_equal(np.asarray(e.cache), after)
  for other in (again, twice):
    np.testing.assert_array_equal(failed.delta, other.delta)
    np.testing.assert_array_equal(failed.tokens, other.tokens)


def test_commit_writes_its_rows_and_nothing_else():
  e = engine("3")
  e.reset()
  before = np.asarray(e.cache).copy()
  result = e.step([Token(1, 2, 9, 7), Prompt(0, 0, PROMPT[:12], 5)])
  after = np.asarray(e.cache)
  np.testing.assert_array_equal(after[:, 1, 2, :, 7], result.delta[:, 1, 2])
  np.testing.assert_array_equal(
    np.swapaxes(after[:, 0, 0, :, 5:17], 1, 2), result.delta[:, 0, 3:]
  )
  changed = (after != before).any(axis=(0, 3, 5))  # [R, B, T]
  assert set(map(tuple, np.argwhere(changed))) == {
    (1, 2, 7), *((0, 0, t) for t in range(5, 17)),
  }  # fmt: skip


@pytest.mark.parametrize("round_", range(7))
def test_sampled_text_is_equal_on_one_rank_and_on_eight(rng, round_):
  """Thousands of steps in all; eight ranks serve others too."""
  steps = OPTIONS.max_len
  seed = 40 + 10 * round_
  one, eight = engine("1"), engine("8")
  one.reset()
  eight.reset()
  seats = [(7, 2), (0, 0), (3, 1)]
  mine = [1 + round_, 2 + round_, 3 + round_]
  theirs = list(mine)
  heat = (0.0, 0.8, 1.3)
  for at in range(steps):
    got = one.step(
      [Token(0, b, mine[b], at, seed + b, heat[b]) for b in range(3)]
    )
    mine = got.tokens[0, :3].tolist()
    work = [
      Token(*seats[b], theirs[b], at, seed + b, heat[b]) for b in range(3)
    ]
    for r in range(8):
      if (r, 1) not in seats:
        work.append(Token(r, 1, int(rng.integers(96)), at, r, 1.0))
    got = eight.step(work)
    theirs = [int(got.tokens[seat]) for seat in seats]
    assert mine == theirs, f"at position {at}"


def test_fastest_numerics_are_close_but_promise_no_bits():
  e = Engine(1, row_block=0, kernels="xla", copies=1)
  result = e.prefill(Prompt(0, 1, PROMPT))
  _, logits, prefilled = expected()
  n = len(PROMPT)
  np.testing.assert_allclose(
    result.logits[0, -1], logits[n - 1], rtol=0, atol=1e-4
  )
  np.testing.assert_allclose(
    e.kv(0, 1, n), prefilled[:, :, :n], rtol=0, atol=1e-4
  )
  assert "does not promise" in type(OPTIONS).__doc__


def test_forward_gives_a_lone_prefix_the_same_bits():
  text, whole, _ = expected()
  part = forward(TINY, harness.tiny_params(), np.array([text[:2]]), OPTIONS)
  np.testing.assert_array_equal(np.asarray(part)[0], whole[:2])


def test_other_kinds_of_layers_keep_the_bits_too():
  e = Engine(3, config=harness.OTHER, copies=1)
  result = e.prefill(Prompt(2, 1, PROMPT))
  batch = np.stack([BESIDE, BESIDE])
  batch[1, : len(PROMPT)] = PROMPT
  params = harness.tiny_params(harness.OTHER)
  logits = forward(harness.OTHER, params, jnp.asarray(batch), OPTIONS)
  want = np.asarray(logits)[1, len(PROMPT) - 1]
  np.testing.assert_array_equal(result.logits[2, -1], want)
