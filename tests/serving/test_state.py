import dataclasses

import numpy as np
import pytest

from resilient_moe.serving import state as st
from resilient_moe.serving.request import Request, Sequence


def request(name: str, prompt: int = 5, new: int = 4) -> Request:
  return Request(name, tuple(range(1, prompt + 1)), new)


@pytest.fixture
def state() -> st.SchedulerState:
  """Ranks 3 and 1, two rows each; a, b on 3, c on 1, d queued."""
  s = st.with_ranks(st.SchedulerState(), (3, 1), 2)
  for name in "abcd":
    s = st.accept(s, request(name))
  for name, rank in (("a", 3), ("b", 3), ("c", 1)):
    s = st.place(s, name, rank, 2)
  return s


def seats(state: st.SchedulerState) -> dict[int, tuple]:
  """Rows by rank; every seat and its holder agree."""
  for rank, names in state.rows.items():
    for row, name in enumerate(names):
      if name is not None:
        s = state.sequences[name]
        assert (s.rank, s.row) == (rank, row)
  seated = [n for names in state.rows.values() for n in names if n]
  assert len(seated) == len(set(seated))
  placed = {n for n, s in state.sequences.items() if s.rank >= 0}
  assert placed == set(seated)
  return dict(state.rows)


def test_accept_queues_in_order_and_refuses_twins(state):
  assert [s.request.request_id for s in state.queued()] == ["d"]
  state = st.accept(state, request("e"), (9, 8))
  assert [s.request.request_id for s in state.queued()] == ["d", "e"]
  assert state.sequences["e"].tokens == (9, 8)
  assert state.accepted == 5
  with pytest.raises(ValueError, match="'e' is in flight already"):
    st.accept(state, request("e"))


def test_place_takes_the_first_free_row_or_refuses(state):
  assert seats(state) == {3: ("a", "b"), 1: ("c", None)}
  moved = st.place(state, "a", 1, 3)
  assert seats(moved) == {3: (None, "b"), 1: ("c", "a")}
  assert moved.sequences["a"].computed == 3
  for rank in (3, 7):
    with pytest.raises(ValueError, match=f"rank {rank} has no free row of"):
      st.place(state, "d", rank, 0)
  assert seats(state) == {3: ("a", "b"), 1: ("c", None)}  # a value


def test_requeue_keeps_the_tokens_and_the_place_in_the_queue(state):
  kept = dataclasses.replace(state.sequences["b"], tokens=(4, 5))
  state = dataclasses.replace(state, sequences={**state.sequences, "b": kept})
  state = st.unplace(state, ["b", "d"])  # d has no row: nothing to do
  assert seats(state) == {3: ("a", None), 1: ("c", None)}
  assert [s.request.request_id for s in state.queued()] == ["b", "d"]
  b = state.sequences["b"]
  assert (b.tokens, b.computed, b.row) == ((4, 5), 0, -1)


def test_new_mesh_seats_its_ranks_and_keeps_what_can_still_be_read(state):
  """Two sit on a rank that left: no step, but their KV can be had."""
  state = st.with_ranks(state, (1, 2), 2)
  assert dict(state.rows) == {1: ("c", None), 2: (None, None)}
  assert [s.request.request_id for s in state.queued()] == ["d"]
  assert state.sequences["a"].rank == 3
  assert state.sequences["a"].computed == 2
  assert st.with_ranks(state, (1, 2), 2) == state  # once is enough
  assert list(st.with_ranks(state, (2, 1), 2).rows) == [2, 1]  # mesh order
  moved = st.place(state, "a", 2, 2)
  assert seats(st.unplace(moved, ["b"])) == {1: ("c", None), 2: ("a", None)}
  back = st.with_ranks(state, (1, 3), 2)
  assert seats(back) == {1: ("c", None), 3: ("a", "b")}


def test_on_a_lost_rank_no_kv_is_left(state):
  state = st.with_ranks(state, (1, 2), 2, lost=(3,))
  held = {n: s.computed for n, s in state.sequences.items()}
  assert held == {"a": 0, "b": 0, "c": 2, "d": 0}


def test_drop_frees_the_rows(state):
  state = st.drop(state, ["a", "d"])
  assert seats(state) == {3: (None, "b"), 1: ("c", None)}
  assert set(state.sequences) == {"b", "c"}


def test_request_table_is_what_a_policy_sees(state):
  table = st.request_table(state, {"a": (2, 1), "c": (1, -1)})
  assert table.request_id == ("a", "b", "c", "d")
  np.testing.assert_array_equal(table.rank, [3, 3, 1, -1])
  np.testing.assert_array_equal(table.prompt_tokens, 5)
  np.testing.assert_array_equal(table.kv_tokens, [2, 2, 2, 0])
  np.testing.assert_array_equal(table.checkpoint_tokens, [2, 0, 1, 0])
  np.testing.assert_array_equal(table.checkpoint_rank, [1, -1, -1, -1])
  with pytest.raises(ValueError, match="read-only"):
    table.rank[0] = 1


def test_tokens_of_a_sequence_by_position():
  s = Sequence(request("a", prompt=3), 0, tokens=(7, 8))
  assert s.known == 5
  assert [s.token(i) for i in range(5)] == [1, 2, 3, 7, 8]
  for start in range(5):
    for stop in range(start, 6):
      assert s.span(start, stop) == (1, 2, 3, 7, 8)[start:stop]
