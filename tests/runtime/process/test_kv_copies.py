"""Who streams to whom and which copy serves, over a crew that only notes."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from resilient_moe.recovery.view import Tier
from resilient_moe.runtime.process import kv_copies
from resilient_moe.runtime.process.kv_copies import HOST
from resilient_moe.runtime.process.stores import Stores
from resilient_moe.serving.backend import Placed
from resilient_moe.serving.scheduler import Chunk
from tests.runtime.process.copies import (
  KEY,
  MESH,
  ROWS,
  SHAPE,
  Copies,
  Crew,
  address,
  batch,
  keep,
  rebased,
  serve,
  targets,
  until,
)


@pytest.fixture
def store() -> Iterator[Stores]:
  made = Stores(1, SHAPE, "float32", KEY)
  yield made
  made.close()


@pytest.fixture
def stores() -> Iterator[Stores]:
  made = Stores(2, SHAPE, "float32", KEY)
  yield made
  made.close()


def test_each_streams_to_the_next_and_a_single_one_to_nobody() -> None:
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  copies.ring(MESH)
  assert targets(crew) == {0: address(1), 1: address(2), 2: address(0)}
  copies.ring(MESH)
  assert targets(crew) == {}, "nothing has changed"
  crew.there -= {1, 2}
  copies.lost([1, 2])
  copies.ring((0,))
  assert targets(crew) == {0: None}


def test_all_stream_to_the_store(store: Stores) -> None:
  crew = Crew(*MESH)
  copies = Copies("host", crew, store)
  copies.ring(MESH)
  assert targets(crew) == dict.fromkeys(MESH, store.addresses()[0])
  crew.there.discard(1)
  copies.lost([1])
  copies.ring((0, 2))
  assert targets(crew) == {}, "theirs is still the same store"
  copies.close((0, 2))


def test_without_checkpoints_nobody_is_told_or_asked() -> None:
  crew = Crew(*MESH)
  copies = Copies("none", crew)
  copies.ring(MESH)
  serve(copies, (0, 0, "a", 4))
  copies.moved((Placed("a", 0, 0, 1, 1, 5),))
  copies.rebase_one()
  assert copies.segments(batch((0, 0, "a", 5))) == {}
  assert copies.records() == {}
  copies.close(MESH)
  assert (crew.told, crew.asked, copies.sums) == ([], [], [])


def test_a_step_is_cut_into_what_each_rank_streams() -> None:
  copies = Copies("peer", Crew(0, 2))
  chunk = Chunk(1, 1, "c", 16, 9, samples=False)
  step = batch(
    (0, 0, "a", 4), (0, 1, "b", 9), (1, 0, "d", 3), mesh=(0, 2),
    chunks=(chunk,),
  )  # fmt: skip
  assert copies.segments(step) == {
    0: [("a", 0, 4, 1), ("b", 1, 9, 1)],
    2: [("d", 0, 3, 1), ("c", ROWS, 16, 9)],
  }


def test_a_new_neighbour_gets_what_the_old_one_had() -> None:
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  copies.ring(MESH)
  targets(crew)
  serve(copies, (0, 0, "a", 4), (1, 1, "b", 6), (2, 0, "c", 8))
  crew.there.discard(1)
  copies.lost([1])
  copies.ring((0, 2))
  assert targets(crew) == {0: address(2)}
  # 2 streams to 0 as before; nobody can stream for 1.
  assert rebased(copies, crew) == {"a": (0, 0, 5)}


def test_a_replacement_of_a_neighbour_is_new() -> None:
  """The rank is the same, its memory isn't."""
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  copies.ring(MESH)
  targets(crew)
  serve(copies, (0, 0, "a", 4))
  copies.lost([1])
  copies.ring(MESH)
  assert set(targets(crew)) == {0, 1}
  assert rebased(copies, crew) == {"a": (0, 0, 5)}


def test_who_moved_streams_anew_from_the_new_seat() -> None:
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  copies.ring(MESH)
  serve(copies, (0, 0, "a", 4))
  copies.moved((Placed("a", 0, 0, 2, 1, 5),))
  assert copies.sitting_on([2]) == ["a"]
  assert copies.sitting_on([0]) == []
  serve(copies, (2, 1, "a", 5))
  assert rebased(copies, crew) == {"a": (2, 1, 6)}


def test_whom_a_holder_refused_streams_anew_once() -> None:
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  serve(copies, (0, 0, "a", 4), (1, 0, "b", 6))
  copies.heard(1, ("b",), 0, ())
  copies.heard(1, ("b", "gone"), 3, ())
  assert copies._rebase.count("b") == 1
  assert rebased(copies, crew) == {"b": (1, 0, 7)}


def test_that_the_store_stopped_is_said_of_a_peer_it_is_known(
  store: Stores,
) -> None:
  for mode, warnings in (("host", ["it stopped"]), ("peer", [])):
    copies = Copies(mode, Crew(*MESH), store)
    copies.ring(MESH)
    copies.heard(1, (), 0, ("it stopped",))
    assert copies.warnings == warnings


def test_who_ended_is_not_streamed() -> None:
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  serve(copies, (0, 0, "a", 4))
  copies.heard(0, ("a",), 0, ())
  serve(copies, (1, 0, "b", 6), retired=("a",))
  assert rebased(copies, crew) == {}


def test_the_longest_copy_serves() -> None:
  crew = Crew(*MESH)
  crew.mirrors = {0: {"a": 5, "b": 9}, 1: {"a": 8}, 2: {"a": 3, "c": 1}}
  copies = Copies("peer", crew)
  assert copies.records() == {"a": (8, 1), "b": (9, 0), "c": (1, 2)}
  crew.rows = {"c": (0, 0, "its holder is gone")}
  placed = tuple(Placed(n, 3, 0, 0, 1, 9) for n in "abcd")
  alive = np.array([True, True, True, False])
  restored, nbytes = copies.restore(placed, Tier.PEER, alive)
  assert (restored, nbytes) == ({"a": 7, "b": 7}, 140)
  (asked,) = [args for op, rank, args in crew.asked if op == "rows"]
  found = {r["request_id"]: (r["what"], r["address"]) for r in asked["rows"]}
  assert found == {
    "a": ("kv", address(1)), "b": ("kv", address(0)), "c": ("kv", address(2)),
  }  # fmt: skip
  assert copies.warnings == [
    "request 'c' is prefilled again: its holder is gone"
  ]


def test_a_rank_that_stands_hands_its_rows_over_once_they_are_written() -> None:
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  placed = (Placed("a", 2, 1, 0, 1, 9),)
  copies.restore(placed, Tier.PEER, np.ones(3, bool))
  assert [(op, rank) for op, rank, _ in crew.asked] == [
    ("done", 2), ("rows", 0)
  ]  # fmt: skip
  ((row,),) = [args["rows"] for op, _, args in crew.asked if op == "rows"]
  assert (row["what"], row["address"], row["args"]) == (
    "row", address(2), (1, 9)
  )  # fmt: skip


def test_what_the_dead_sent_is_awaited_once_and_the_stuck_never() -> None:
  crew = Crew(*MESH)
  copies = Copies("peer", crew)
  crew.there -= {1, 2}
  crew.fenced = {2}  # its streams stay open until it is killed
  copies.lost([1, 2])
  copies.records()
  copies.records()
  asked = [args["ended"] for op, _, args in crew.asked if op == "records"]
  assert asked == [[1], []]


def test_a_dead_store_leaves_a_warning_and_nothing_else(
  store: Stores,
) -> None:
  crew = Crew(*MESH)
  copies = Copies("host", crew, store)
  copies.ring(MESH)
  targets(crew)
  assert copies.records() == {}
  assert copies.warnings == []
  os.kill(store.pids[0], signal.SIGKILL)
  copies.lost([1])
  until(lambda: copies.look() or copies.warnings)
  copies.look()
  assert copies.warnings == [
    "KV store 0 is gone: requests of ranks [0, 2] are prefilled when they move"
  ]
  assert copies.records() == {}
  assert targets(crew) == {}, "there is no other"
  assert copies.restore(
    (Placed("a", 1, 0, 0, 0, 4),), Tier.HOST, np.array([True, False, True])
  ) == ({}, 0)
  copies.close((0, 2))
  assert [s["event"] for s in copies.sums] == ["checkpoint"]


def test_the_host_is_the_holder_of_what_the_store_keeps(
  store: Stores,
) -> None:
  copies = Copies("host", Crew(*MESH), store)
  keep(copies, store, 0, {"a": 4})
  assert copies.records() == {"a": (4, HOST)}
  copies.close(MESH)


def test_a_store_that_dies_unnoticed_is_warned_of(store: Stores) -> None:
  copies = Copies("host", Crew(*MESH), store)
  address = store.addresses()[0]
  store.kill(0)
  # As if it had died between the look at it and the question.
  store.addresses = lambda: {0: address}  # type: ignore[method-assign]
  assert copies.records() == {}
  (text,) = copies.warnings
  assert text.startswith("KV store 0 is given up, requests are prefilled")


def test_a_store_that_is_stuck_is_given_up(
  stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Once: what it kept is gone, and who streamed to it goes to another."""
  monkeypatch.setattr(kv_copies, "STORE_S", 0.2)
  crew = Crew(*MESH)
  copies = Copies("host", crew, stores)
  copies.ring(MESH)
  targets(crew)
  at = stores.addresses()
  pid = stores.pids[0]
  os.kill(pid, signal.SIGSTOP)
  assert copies.records() == {}
  assert copies.records() == {}
  copies.look()
  given_up, gone = copies.warnings
  assert given_up.startswith("KV store 0 is given up")
  assert gone.startswith("KV store 0 is gone: requests of ranks [0, 2] stream")
  assert targets(crew) == {0: at[1], 2: at[1]}
  copies.close(())


def test_ranks_are_spread_over_the_stores_and_the_longest_copy_serves(
  stores: Stores,
) -> None:
  crew = Crew(*MESH)
  copies = Copies("host", crew, stores)
  at = stores.addresses()
  copies.ring(MESH)
  assert targets(crew) == {0: at[0], 1: at[1], 2: at[0]}
  keep(copies, stores, 0, {"a": 4, "b": 7})
  keep(copies, stores, 1, {"a": 9})
  assert copies.records() == {"a": (9, HOST), "b": (7, HOST)}
  placed = tuple(Placed(n, 1, 0, 0, 1, 9) for n in "ab")
  copies.restore(placed, Tier.HOST, np.array([True, False, True]))
  ((asked),) = [args["rows"] for op, _, args in crew.asked if op == "rows"]
  assert {r["request_id"]: r["address"] for r in asked} == {
    "a": at[1], "b": at[0]
  }  # fmt: skip


def test_who_streamed_to_a_dead_store_streams_everything_to_another(
  stores: Stores,
) -> None:
  crew = Crew(*MESH)
  copies = Copies("host", crew, stores)
  copies.ring(MESH)
  targets(crew)
  left = stores.addresses()[1]
  serve(copies, (0, 0, "a", 4), (1, 0, "b", 5), (2, 1, "c", 6))
  stores.kill(0)
  copies.look()
  copies.look()
  assert copies.warnings == [
    "KV store 0 is gone: requests of ranks [0, 2] stream to another"
  ]
  assert targets(crew) == {0: left, 2: left}
  assert rebased(copies, crew) == {"a": (0, 0, 5), "c": (2, 1, 7)}
  crew.there.discard(1)
  copies.lost([1])
  copies.ring(MESH)
  assert targets(crew) == {1: left}, "nobody is sent to a dead one"
