"""Who is late, slow, or behind a link that is cut."""

import numpy as np
import pytest

from resilient_moe.datapath.healing import HealingLimits
from resilient_moe.datapath.parcels import Gone
from resilient_moe.datapath.routes import ExpertsUnreachable
from tests.datapath import fake
from tests.datapath.fake import ALL, EVERYWHERE, SHADOWS, SINGLE, E, Scene


def test_late_but_alive_is_not_dead():
  scene = Scene(fake.routes(0, SINGLE, SHADOWS))
  scene.links.delay_s[1] = 0.4
  scene.check_step()
  assert scene.events == []
  assert scene.routes.state() == (0, frozenset())
  assert {rank for _, rank in scene.links.probes} == {1}
  gaps = np.diff([at for at, _ in scene.links.probes])
  assert gaps.min() >= HealingLimits().late_s - 1e-9


def test_a_cut_link_is_left_for_another_copy():
  scene = Scene(fake.routes(0, SINGLE, SHADOWS))
  scene.links.cut(1)
  scene.check_step()
  (facts,) = scene.told("link_bad")
  assert facts["rank"] == 1
  assert facts["elsewhere"]
  limits = HealingLimits()
  assert limits.link_s <= facts["seconds"] <= limits.link_s + limits.late_s * 2
  assert scene.routes.state() == (0, {(1, 0)})


@pytest.mark.parametrize("mends", [False, True])
def test_a_replay_does_not_excuse_what_is_owed_longer(mends):
  # A place from which what 3 owes goes to 1.
  scene = Scene(fake.routes(0, EVERYWHERE), place=4)
  scene.links.cut(1)
  scene.links.delay_s[3] = 9.0
  if mends:  # in time to answer the replay
    scene.links.after(0.3, lambda: scene.links.mend(1))
  scene.links.after(0.3, lambda: scene.links.kill(3))
  scene.check_run()
  assert 1 in [rank for rank, *_, urgent in scene.links.log if urgent]
  assert scene.links.time < HealingLimits().link_s + 0.1


def test_a_rank_that_has_answered_owes_since_its_next_parcel():
  scene = Scene(fake.routes(0, EVERYWHERE), place=4)
  scene.links.delay_s |= {1: 0.3, 3: 9.0}
  scene.links.after(0.25, lambda: scene.links.kill(3))
  scene.check_run()
  assert scene.links.time == pytest.approx(0.55)
  assert scene.told("link_bad") == []


def test_the_only_copy_behind_a_silent_link_is_waited_for():
  # 1 and 5 are owed by rank 1; a shadow of one of them alone doesn't help.
  scene = Scene(fake.routes(0, SINGLE, {1: [(3, 5)]}))
  scene.links.delay_s[1] = 0.7
  scene.check_run()
  assert scene.links.time == pytest.approx(0.7)
  assert [f["elsewhere"] for f in scene.told("link_bad")] == [False]
  assert scene.routes.state() == (0, frozenset())


def test_the_only_copy_behind_a_cut_link_ends_the_step():
  """Soon enough for a plan to act: the time of a bad link and of a push."""
  limits = HealingLimits(link_s=0.3, push_s=0.2)
  scene = Scene(fake.routes(0, SINGLE), limits=limits)
  scene.links.cut(1)
  with pytest.raises(ExpertsUnreachable, match=r"\[1, 5\]") as raised:
    scene.exchange.run(0, *ALL)
  assert not raised.value.masked
  assert [f["rank"] for f in scene.told("link_bad")] == [1]
  late = limits.late_s + 3 * limits.tick_s
  assert 0.5 <= scene.links.time <= 0.5 + late
  assert scene.routes.state() == (0, frozenset())


def test_a_push_saves_what_a_cut_link_holds_back():
  moved = {e: [(r if r != 1 else 2, 8 + e) for r, _ in SINGLE[e]]
           for e in range(E)}  # fmt: skip
  tables = fake.routes(0, SINGLE), fake.routes(1, moved)
  scene = Scene(*tables)
  scene.links.cut(1)
  scene.links.after(0.6, lambda: scene.routes.push(tables[1]))
  scene.check_run()
  assert scene.links.time < 0.65
  assert [f["rank"] for f in scene.told("healed")] == [1]


def test_a_second_cut_link_gets_no_time_of_its_own():
  limits = HealingLimits(link_s=0.3, push_s=0.2)
  scene = Scene(fake.routes(0, SINGLE), limits=limits)
  scene.links.cut(1)
  scene.links.cut(3)
  with pytest.raises(ExpertsUnreachable, match=r"\[1, 3, 5, 7\]"):
    scene.exchange.run(0, *ALL)
  assert scene.links.time <= 0.5 + limits.late_s + 3 * limits.tick_s


def test_a_link_is_blamed_again_once_its_rank_has_the_only_copy():
  """It was spared for a shadow, whose rank is dead by now."""
  scene = Scene(fake.routes(0, SINGLE, SHADOWS))
  scene.links.cut(1)
  scene.check_run()
  assert [f["elsewhere"] for f in scene.told("link_bad")] == [True]
  scene.links.kill(3)  # with its own, whose shadows 1 has, and 1's shadows
  with pytest.raises(ExpertsUnreachable, match=r"\[1, 3, 5, 7\]"):
    scene.exchange.run(1, *ALL)
  said = scene.told("link_bad")
  assert [(f["rank"], f["elsewhere"]) for f in said] == [(1, True), (1, False)]


def test_a_dead_rank_with_the_only_copy_is_no_bad_link():
  scene = Scene(fake.routes(0, SINGLE))
  scene.links.kill(1)
  for _ in range(2):
    with pytest.raises(ExpertsUnreachable):
      scene.exchange.run(0, *ALL)
  assert scene.told("link_bad") == []


@pytest.mark.parametrize("known", [False, True])
def test_the_end_of_an_older_process_is_not_the_new_ones(known):
  """Told late, behind a parcel for the process that took its place."""
  tables = fake.routes(0, SINGLE), fake.routes(1, SINGLE, incarnations={1: 1})
  scene = Scene(*tables)
  scene.routes.push(tables[1])
  old = Gone(1, 0) if known else Gone(1)
  scene.links.script("send", 3, lambda: scene.links._put(0.0, old))
  if known:
    scene.check_run()
    assert scene.routes.state() == (1, frozenset())
  else:  # nobody can know better
    with pytest.raises(ExpertsUnreachable):
      scene.exchange.run(0, *ALL)


def test_what_came_while_the_thread_was_held_up_is_not_late():
  scene = Scene(fake.routes(0, SINGLE))
  scene.links.together = True

  def held_up() -> None:
    scene.links.time += 1.0

  scene.links.script("send", 3, held_up)
  scene.exchange.run(0, *ALL)
  assert scene.links.probes == []
