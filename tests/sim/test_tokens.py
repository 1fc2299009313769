"""What simulated rows say: the same for the same KV, something else if not."""

import dataclasses

import numpy as np
import pytest

from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import admit, complete, schedule
from resilient_moe.serving.state import SchedulerState, accept, with_ranks
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.copies import Copies
from resilient_moe.sim.tokens import Rows, mask_key

REQUEST = Request("a", tuple(range(20)), 6, seed=3)
MASK = mask_key(np.array([True, False]))


def served(rows: Rows, chunk: int, key: bytes = b"") -> tuple[int, ...]:
  """All tokens of the request, prefilled in chunks of this width."""
  state = accept(with_ranks(SchedulerState(), (0,), 1), REQUEST)
  state, _ = admit(state)
  tokens: list[int] = []
  while True:
    batch = schedule(state, number=0, epoch=0, chunk=chunk, rows=1)
    if batch is None:
      return tuple(tokens)
    said, delta = rows.compute(batch, key)
    rows.commit(delta)
    state, emitted, _ = complete(state, batch, said)
    tokens += [e.token for e in emitted]


def test_chunks_of_any_width_say_the_same() -> None:
  said = {served(Rows(256), chunk) for chunk in (1, 3, 7, 64)}
  assert len(said) == 1
  assert len(said.pop()) == REQUEST.max_new_tokens


def test_tokens_stay_inside_a_small_vocabulary() -> None:
  assert max(served(Rows(7), 64)) < 7


def test_a_mask_says_something_else_and_always_the_same() -> None:
  masked = {served(Rows(256), chunk, MASK) for chunk in (3, 64)}
  assert len(masked) == 1
  assert masked != {served(Rows(256), 64)}


@pytest.mark.parametrize("spoil", ["lost", "other's", "short"])
def test_kv_that_is_not_its_own_shows(spoil: str) -> None:
  rows = Rows(256)
  fine = served(rows, 64)
  held = rows.read(0, 0, "a", 25)
  assert held is not None
  assert rows.read(0, 0, "a", 24) is rows.read(0, 0, "b", 25) is None
  state = accept(with_ranks(SchedulerState(), (0,), 1), REQUEST, fine[:5])
  state, _ = admit(state)
  if spoil == "lost":
    rows.lose(0)
  elif spoil == "other's":
    rows.write(0, 0, held._replace(request_id="b", tokens=24))
  else:
    rows.write(0, 0, held._replace(tokens=23))
  s = state.sequences["a"]
  batch = schedule(
    with_computed(state, 24), number=0, epoch=0, chunk=64, rows=1
  )
  assert batch is not None
  said, _ = rows.compute(batch, b"")
  assert s.known == 25
  assert said[0, 0] != fine[5]
  assert rows.wrong == ["a"]


def with_computed(state: SchedulerState, computed: int) -> SchedulerState:
  """As if the row held so many positions."""
  s = dataclasses.replace(state.sequences["a"], computed=computed)
  return dataclasses.replace(state, sequences={"a": s})


def streamed(mode: str, lag: float) -> tuple[VirtualClock, Copies]:
  """One prompt of rank 0, on its way to rank 1 or to the host."""
  clock, rows = VirtualClock(), Rows(256)
  copies = Copies(mode, clock, lambda n: lag * n, 10)
  copies.ring = (0, 1)
  state = accept(with_ranks(SchedulerState(), (0, 1), 1), REQUEST)
  state, _ = admit(state)
  batch = schedule(state, number=0, epoch=0, chunk=64, rows=1)
  assert batch is not None
  copies.stream(batch, rows.compute(batch, b"")[1])
  return clock, copies


@pytest.mark.parametrize(("mode", "holder"), [("peer", 1), ("host", -1)])
def test_a_checkpoint_counts_once_it_has_arrived(
  mode: str, holder: int
) -> None:
  clock, copies = streamed(mode, 0.1)
  clock.spend(1.9)
  assert copies.records() == {}
  clock.spend(0.2)
  assert copies.records() == {"a": (20, holder)}
  assert copies.nbytes == 200
  copies.forget_rank(1)
  assert copies.records() == ({} if mode == "peer" else {"a": (20, -1)})


def test_what_a_dead_rank_had_not_sent_is_lost() -> None:
  clock, copies = streamed("host", 0.1)
  copies.forget_rank(0)
  clock.spend(9.0)
  assert copies.records() == {}
