"""What waits to be sent is bounded in steps, whole or logged by layers."""

from resilient_moe.runtime.process.layer_log import (
  Backlog,
  Commit,
  Drain,
  Forget,
  Log,
  Rebase,
  Step,
)
from resilient_moe.runtime.process.mirror import Segment

L = 3


def queued(backlog: Backlog) -> list[object]:
  items = []
  while backlog:
    items.append(backlog.take()[1])
  return items


def test_a_logged_step_is_dropped_whole():
  backlog = Backlog(2)
  segments: list[Segment] = [("a", 0, 0, 1)]
  first = [Log(0, layer, None, None) for layer in range(L)]
  second = [Log(1, layer, None, None) for layer in range(L)]
  forget, drain = Forget(["x"]), Drain()
  items = [first[0], second[0], forget, *first[1:], Commit(0, segments), drain]
  assert not any(backlog.add(item, 0.0) for item in [*items, *second[1:]])
  assert backlog.steps() == 2
  assert backlog.add(Step(segments, None), 0.0)
  assert backlog.steps() == 2
  assert backlog.add(Rebase("a", None), 0.0)
  assert backlog.steps() == 1, "a rebase is none"
  assert backlog.add(Commit(5, segments), 0.0)
  assert queued(backlog) == [
    forget, drain, Rebase("a", None), Commit(5, segments)
  ]  # fmt: skip
  assert backlog.steps() == 0


def test_equal_steps_are_not_the_same():
  backlog = Backlog(2)
  for _ in range(2):
    assert not backlog.add(Step([], None), 0.0)
  assert backlog.steps() == 2
  assert backlog.add(Step([], None), 0.0)
  assert len(queued(backlog)) == 2


def test_what_is_half_taken_still_counts_once():
  backlog = Backlog(1)
  items = [Log(0, layer, None, None) for layer in range(2)]
  for item in items:
    backlog.add(item, 1.5)
  assert backlog.take() == (1.5, items[0])
  assert backlog.has(items[0])
  assert backlog.steps() == 1
  assert not backlog.add(Commit(0, []), 2.0)
  drain = Drain()
  backlog.add(drain, 3.0)
  assert backlog.clear() == [drain]
  assert (bool(backlog), backlog.steps()) == (False, 0)
