"""The expert routing table: lookups, marks, and that their order is free."""

import threading

import numpy as np
import pytest

from resilient_moe.datapath.healing import HealingLimits
from resilient_moe.datapath.routes import ExpertRoutes, Routes
from tests.datapath import fake
from tests.datapath.fake import ALL, DOUBLE, SINGLE, E, Scene

# Expert 0 has two copies, 1 a shadow, 2 one copy, 3 none.
SERVING = {0: [(0, 0), (1, 0)], 1: [(0, 1)], 2: [(2, 0)], 3: []}
STANDBY = {1: [(1, 1), (2, 1)]}


def table(epoch: int = 0, **kwargs) -> Routes:
  return fake.routes(epoch, SERVING, STANDBY, **kwargs)


def look(routes: ExpertRoutes, experts: list[int], spread: list[int]):
  rank, slot = routes.lookup(
    np.array(experts, np.int32), np.array(spread, np.int32)
  )
  assert rank.dtype == slot.dtype == np.int32
  return list(zip(rank.tolist(), slot.tolist(), strict=True))


def test_lookups_spread_over_the_copies_that_serve():
  found = look(ExpertRoutes(table()), [0, 0, 0, 1, 2, 3], [0, 1, 2, 1, 1, 0])
  assert found == [(0, 0), (1, 0), (0, 0), (0, 1), (2, 0), (-1, -1)]


def test_a_dead_copy_leaves_the_others():
  routes = ExpertRoutes(table())
  assert routes.down(0)
  assert look(routes, [0, 0], [0, 1]) == [(1, 0), (1, 0)]


def test_a_shadow_serves_when_nobody_else_does_and_the_next_after_it():
  routes = ExpertRoutes(table())
  routes.down(0)
  assert look(routes, [1, 1], [0, 1]) == [(1, 1), (1, 1)]
  routes.down(1)
  assert look(routes, [1], [0]) == [(2, 1)]
  assert routes.unreachable(np.array([3, 1, 0, 0, 2])) == [0, 3]
  routes.up(0)
  assert look(routes, [1], [0]) == [(0, 1)]
  assert routes.state() == (0, {(1, 0)})


def test_the_version_grows_with_what_changes_lookups():
  routes = ExpertRoutes(table(epoch=5))
  version = routes.version
  for act, changes in (
    (lambda: routes.down(0), True),
    (lambda: routes.down(0), False),  # known
    (lambda: routes.down(9), False),  # not in the table
    (lambda: routes.down(1, 7), False),  # a process that isn't in it yet
    (lambda: routes.up(0), True),
    (lambda: routes.up(0), False),
    (lambda: routes.push(table(epoch=5)), False),
    (lambda: routes.push(table(epoch=4)), False),
    (lambda: routes.push(table(epoch=6)), True),
  ):
    assert act() is changes
    assert (routes.version > version) is changes
    version = routes.version


def test_a_push_forgives_the_next_process_and_not_the_same():
  routes = ExpertRoutes(table(epoch=0))
  routes.down(0)
  routes.push(table(epoch=1))
  assert routes.state() == (1, {(0, 0)})
  routes.push(table(epoch=2, incarnations={0: 1}))
  assert routes.state() == (2, frozenset())
  assert not routes.down(0, 0)  # old news
  assert look(routes, [1], [0]) == [(0, 1)]


def test_a_process_that_left_and_came_back_is_trusted():
  routes = ExpertRoutes(table(epoch=0))
  routes.push(table(epoch=1, incarnations={2: 1}))
  routes.down(2)
  routes.push(fake.routes(2, {0: [(0, 0)], 1: [(0, 1)], 2: [], 3: []}))
  routes.down(2, 1)
  routes.push(table(epoch=3, incarnations={2: 1}))
  assert routes.state() == (3, frozenset())


def test_another_copy_is_one_on_another_live_rank():
  routes = ExpertRoutes(table())
  assert routes.table().elsewhere(np.array([0, 1]), 0)
  assert not routes.table().elsewhere(np.array([0, 2]), 2)
  routes.down(1)
  assert not routes.table().elsewhere(np.array([0]), 0)
  assert routes.table().elsewhere(np.array([1]), 0)  # the second shadow


@pytest.mark.parametrize(
  ("broken", "says"),
  [
    (table()._replace(serving=np.zeros((3, 1, 2), np.int32)), r"\(3, 1, 2\)"),
    (table()._replace(standby=np.zeros((4, 2), np.int32)), r"\(4, 2\)"),
    (table()._replace(incarnations={0: 0, 2: 0}), r"ranks \[1\]"),
  ],
)
def test_routes_that_make_no_sense_are_refused(broken, says):
  with pytest.raises(ValueError, match=says):
    ExpertRoutes(broken)
  with pytest.raises(ValueError, match=says):
    ExpertRoutes(table()).push(broken._replace(epoch=1))


def test_the_number_of_experts_is_fixed():
  with pytest.raises(ValueError, match="5 experts pushed to a table of 4"):
    ExpertRoutes(table()).push(fake.routes(1, {e: [(0, e)] for e in range(5)}))


def history(rng: np.random.Generator, n_ranks: int, epochs: int):
  """Tables whose processes, once out, don't come back; and all of those."""
  n_experts, incarnation = 6, np.zeros(n_ranks, int)
  was_in, tables = np.zeros(n_ranks, bool), []
  for epoch in range(epochs):
    is_in = rng.random(n_ranks) < 0.7
    # A new process after an absence, sometimes without one that a table saw.
    again = is_in & (was_in | (epoch > 0)) & (rng.random(n_ranks) < 0.3)
    away = is_in & ~was_in & (epoch > 0)
    incarnation += (again | away).astype(int)
    was_in = is_in
    ranks = np.flatnonzero(is_in)
    copies: list[dict] = [{}, {}]
    for kind, e in np.ndindex(2, n_experts):
      some = ranks[rng.random(len(ranks)) < 0.4]
      copies[kind][e] = [(int(r), int(e)) for r in some]
    named = {r for kind in copies for c in kind.values() for r, _ in c}
    was_in = np.isin(np.arange(n_ranks), list(named))
    tables.append(
      fake.routes(
        epoch, copies[0], copies[1], dict(enumerate(incarnation.tolist()))
      )
    )
  members = [
    (r, i) for r in range(n_ranks) for i in range(int(incarnation[r]) + 1)
  ]
  return tables, members


def test_pushes_and_marks_end_the_same_in_any_order(rng):
  experts = np.tile(np.arange(6, dtype=np.int32), 4)
  spread = np.repeat(np.arange(4, dtype=np.int32), 6)
  marked = 0
  for _ in range(40):
    tables, members = history(rng, n_ranks=4, epochs=5)
    dead = [m for m in members if rng.random() < 0.4]
    news = [("push", t) for t in tables[1:]] + [("down", m) for m in dead]
    ends = []
    for _ in range(12):
      routes = ExpertRoutes(tables[0])
      for i in rng.permutation(len(news)):
        kind, what = news[i]
        routes.push(what) if kind == "push" else routes.down(*what)
      rank, slot = routes.lookup(experts, spread)
      ends.append((routes.state(), rank.tolist(), slot.tolist()))
    assert all(end == ends[0] for end in ends)
    assert ends[0][0][0] == 4
    marked += len(ends[0][0][1])
  assert marked > 20  # the marks mattered


def test_lookups_agree_with_themselves_while_pushes_come():
  # Table i has every expert on rank i, slot i.
  tables = [
    fake.routes(i, {e: [(i, i)] for e in range(64)}) for i in range(200)
  ]
  routes, torn, stop = ExpertRoutes(tables[0]), [], threading.Event()
  experts = np.arange(64, dtype=np.int32)

  def read() -> None:
    while not stop.is_set():
      rank, slot = routes.lookup(experts, experts)
      if (rank != rank[0]).any() or (slot != rank).any():
        torn.append((rank, slot))

  reader = threading.Thread(target=read)
  reader.start()
  for t in tables[1:]:
    routes.push(t)
    routes.down(t.epoch - 1, 0)
  stop.set()
  reader.join(10)
  assert not reader.is_alive()
  assert not torn


# Under an exchange.


def test_healing_and_a_push_end_the_same_in_both_orders():
  before, after = fake.routes(0, DOUBLE), fake.routes(1, DOUBLE)
  states = []
  for push_first in (True, False):
    scene = Scene(before)
    if push_first:
      scene.routes.push(after)
    scene.links.script("result", 1, lambda s=scene: s.links.kill(3))
    scene.check_run()
    scene.routes.push(after)
    lookup = scene.routes.lookup(np.arange(E), np.arange(E))
    states.append((scene.routes.state(), np.array(lookup).tolist()))
  assert states[0] == states[1]
  assert states[0][0] == (1, {(3, 0)})


def test_a_push_without_a_rank_sends_what_it_owed_elsewhere():
  without = {e: [((e % 4) % 3, 8 + e)] for e in range(E)}
  tables = fake.routes(0, SINGLE), fake.routes(1, without)
  scene = Scene(*tables)
  scene.links.cut(3)  # and nothing tells the AW
  scene.links.after(0.01, lambda: scene.routes.push(tables[1]))
  scene.check_step()
  assert scene.links.time < HealingLimits().late_s
  assert scene.links.probes == []


@pytest.mark.parametrize(("silent", "after_s"), [(False, 0.1), (True, 0.01)])
def test_the_next_process_of_a_rank_is_asked_again(silent, after_s):
  tables = fake.routes(0, SINGLE), fake.routes(1, SINGLE, incarnations={2: 1})
  scene = Scene(*tables)

  def replaced() -> None:
    scene.links.start(2)
    scene.routes.push(tables[1])

  scene.links.kill(2, silent)
  scene.links.after(after_s, replaced)
  scene.check_step()
  assert scene.links.probes == []
  assert scene.routes.state() == (1, frozenset())


def test_an_old_end_of_a_link_is_not_held_against_the_next_process():
  tables = fake.routes(0, SINGLE), fake.routes(1, SINGLE, incarnations={2: 1})
  scene = Scene(*tables)
  scene.exchange.run(0, *ALL)
  scene.links.kill(2)  # while nobody listens
  scene.links.start(2)
  scene.routes.push(tables[1])
  scene.check_run()
  assert scene.routes.state() == (1, frozenset())
  assert scene.exchange.healed == 0
