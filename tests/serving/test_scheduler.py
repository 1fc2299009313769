import copy
import re

import numpy as np
import pytest

from resilient_moe.serving import scheduler as sch
from resilient_moe.serving import state as st
from resilient_moe.serving.request import Request

CHUNK, ROWS = 6, 2


def instance(prompts: dict[str, int], ranks=(0, 1), **fields):
  s = st.with_ranks(st.SchedulerState(), ranks, ROWS)
  for i, (name, n) in enumerate(prompts.items()):
    prompt = tuple(range(10 * i + 1, 10 * i + 1 + n))
    given = {"max_new_tokens": 3, "seed": i, "temperature": i / 2, **fields}
    s = st.accept(s, Request(name, prompt, **given))
  return s


def schedule(state, number: int = 0):
  return sch.schedule(state, number=number, epoch=4, chunk=CHUNK, rows=ROWS)


def sampled(batch, token: int = 30) -> np.ndarray:
  return np.full((len(batch.mesh), ROWS + 1), token, np.int32)


def finish(state, token: int = 30) -> tuple[list, dict, dict]:
  """Serves until everybody is answered: batches, texts, reasons."""
  batches: list[sch.StepBatch] = []
  texts: dict[str, list[tuple[int, int]]] = {}
  reasons: dict[str, tuple[str, int]] = {}
  while state.sequences:
    state, _ = sch.admit(state)
    batch = schedule(state, len(batches))
    assert batch is not None
    state, emissions, finished = sch.complete(
      state, batch, sampled(batch, token)
    )
    batches.append(batch)
    for name, position, value in emissions:
      texts.setdefault(name, []).append((position, value))
    reasons |= {f.request_id: (f.reason, f.tokens) for f in finished}
  return batches, texts, reasons


def test_admission_is_first_come_first_served_and_balanced():
  state = instance(dict.fromkeys("abcdef", 5), ranks=(0, 1))
  state, names = sch.admit(state)
  assert names == ("a", "b", "c", "d")
  assert dict(state.rows) == {0: ("a", "c"), 1: ("b", "d")}
  assert [s.request.request_id for s in state.queued()] == ["e", "f"]
  assert sch.admit(state) == (state, ())
  state = st.drop(state, ["d"])
  state, names = sch.admit(state)
  assert names == ("e",)
  assert state.rows[1] == ("b", "e")


def test_requeued_request_is_admitted_before_later_ones():
  state, _ = sch.admit(instance(dict.fromkeys("abcde", 5)))
  state = st.unplace(state, ["b"])
  state, names = sch.admit(state)
  assert names == ("b",)


def test_prompt_is_prefilled_in_chunks_and_the_last_one_samples():
  state, _ = sch.admit(instance({"a": 14}))
  widths = []
  for _ in range(2):
    batch = schedule(state)
    widths.append([(c.start, c.length, c.samples) for c in batch.chunks])
    assert batch.width == CHUNK
    state, emissions, _ = sch.complete(state, batch, sampled(batch))
    assert emissions == ()
  assert widths == [[(0, 6, False)], [(6, 6, False)]]
  assert state.sequences["a"].computed == 12
  batch = schedule(state)  # two tokens are left: through a decode row
  assert batch.width == 0
  assert batch.rows[0][3:] == (12, False)


def test_chunk_that_ends_the_prompt_samples_from_its_last_lane():
  state, _ = sch.admit(instance({"a": 11}))
  state, *_ = sch.complete(state, b := schedule(state), sampled(b))
  batch = schedule(state)
  assert batch.chunks[0][3:] == (6, 5, True)
  assert batch.width == CHUNK  # however short the chunk
  tokens = np.full((2, ROWS + 1), 99)
  tokens[batch.chunks[0].place, -1] = 17
  state, emissions, _ = sch.complete(state, batch, tokens)
  assert emissions == (sch.Emission("a", 11, 17),)


def test_arrays_say_what_the_rows_say():
  state, _ = sch.admit(instance({"a": 2, "b": 11, "c": 9, "d": 1}))
  batch = schedule(state, number=7)
  assert (batch.number, batch.epoch, batch.mesh) == (7, 4, (0, 1))
  assert {r.request_id for r in batch.rows} == {"a", "d"}
  assert [c.request_id for c in batch.chunks] == ["c", "b"]
  np.testing.assert_array_equal(batch.decode[0], [[1, 0, 0], [0, -1, 0]])
  np.testing.assert_array_equal(batch.decode[1], [[0, -1, 0], [31, 0, 3]])
  np.testing.assert_allclose(batch.decode_temperature, [[0, 0], [0, 1.5]])
  np.testing.assert_array_equal(batch.chunk[0], np.arange(21, 27))
  np.testing.assert_array_equal(batch.chunk[1], np.arange(11, 17))
  np.testing.assert_array_equal(
    batch.chunk_fields, [[0, 6, 1, 2], [0, 6, 0, 1]]
  )
  np.testing.assert_allclose(batch.chunk_temperature, [1, 0.5])
  assert batch.prefill_tokens == 12


def test_one_chunk_a_rank_and_the_oldest_prompt_first():
  state, _ = sch.admit(instance({"a": 20, "b": 20, "c": 20}, ranks=(5,)))
  assert [c.request_id for c in schedule(state).chunks] == ["a"]
  state = st.unplace(state, ["a"])
  state = st.place(st.place(state, "c", 5, 0), "b", 5, 0)
  assert state.rows[5] == ("c", "b")
  assert [c.request_id for c in schedule(state).chunks] == ["b"]


def test_shapes_are_bounded_whatever_the_load(rng):
  prompts = {f"r{i}": int(n) for i, n in enumerate(rng.integers(1, 40, 30))}
  batches, texts, _ = finish(instance(prompts, ranks=(0, 2, 5)))
  for b in batches:
    assert b.width in (0, CHUNK)
    assert b.decode.shape == (3, ROWS, 3)
    assert b.decode_temperature.shape == (3, ROWS)
    assert b.chunk.shape == (3, b.width)
    assert len({c.place for c in b.chunks}) == len(b.chunks)
  for name, n in prompts.items():
    assert [p for p, _ in texts[name]] == [n, n + 1, n + 2]


def test_every_position_is_computed_once_and_in_order(rng):
  prompts = {f"r{i}": int(n) for i, n in enumerate(rng.integers(1, 30, 9))}
  batches, _, _ = finish(instance(prompts))
  computed = {name: [] for name in prompts}
  for b in batches:
    for r in b.rows:
      computed[r.request_id].append(r.position)
    for c in b.chunks:
      computed[c.request_id].extend(range(c.start, c.start + c.length))
  for name, n in prompts.items():
    assert computed[name] == list(range(n + 2))  # the last token isn't fed


def test_short_suffix_goes_through_decode_rows_without_widening():
  state, _ = sch.admit(instance({"a": 9}))
  a = state.sequences["a"]
  state = st.place(state, "a", 1, a.known - sch.SHORT_SUFFIX)
  for position in (6, 7, 8):
    batch = schedule(state)
    assert batch.width == 0
    assert batch.rows[0].position == position
    assert batch.rows[0].samples == (position == 8)
    state, emissions, _ = sch.complete(state, batch, sampled(batch))
    assert len(emissions) == (position == 8)
  state = st.place(state, "a", 1, 10 - sch.SHORT_SUFFIX - 1)
  assert schedule(state).width == CHUNK  # one token more is a chunk


def test_stop_token_ends_the_text_and_is_part_of_it():
  state = instance({"a": 4, "b": 4}, stop=(30,))
  _, texts, reasons = finish(state, token=30)
  assert reasons == {"a": ("stop", 1), "b": ("stop", 1)}
  assert texts["a"] == [(4, 30)]
  _, texts, reasons = finish(state, token=31)
  assert reasons["a"] == ("length", 3)
  assert len(texts["a"]) == 3


def test_tokens_of_an_earlier_engine_count_towards_the_length():
  state = st.accept(instance({}), Request("a", (1, 2), 3), (5, 6))
  _, texts, reasons = finish(state)
  assert texts["a"] == [(4, 30)]
  assert reasons["a"] == ("length", 3)


def test_dropping_a_batch_leaves_the_state_and_gives_the_same_batch():
  state, _ = sch.admit(instance({"a": 9, "b": 2, "c": 14}))
  kept = copy.deepcopy(state)
  first = schedule(state)
  sch.complete(state, first, sampled(first))
  assert state == kept
  second = schedule(state)
  for name, value in vars(first).items():
    np.testing.assert_array_equal(value, getattr(second, name))


def test_nobody_seated_is_no_batch():
  assert schedule(instance({})) is None
  assert schedule(instance({"a": 3})) is None  # queued, not admitted


@pytest.mark.parametrize(
  ("prompt", "new", "reason"),
  [
    ((), 1, "the prompt is empty; at least 1 token"),
    ((1,), 0, "max_new_tokens=0; at least 1"),
    ((1,) * 6, 5, "6 prompt . 5 new tokens are longer than .* 10 positions"),
    ((1, 50), 2, "token 50 is outside the vocabulary of 50"),
    ((-1,), 2, "token -1 is outside"),
    ((1,) * 5, 5, None),
    ((0, 49), 1, None),
  ],
)
def test_refusals_name_the_value_and_the_limit(prompt, new, reason):
  said = sch.refusal(Request("r", prompt, new), 10, 50)
  assert said is None if reason is None else re.search(reason, said)
