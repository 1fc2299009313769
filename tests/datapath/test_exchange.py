"""A layer's trip to the experts gives the same whatever breaks on the way."""

import functools
import threading
import time

import numpy as np
import pytest

from resilient_moe.datapath.exchange import ExchangeCancelled
from resilient_moe.datapath.healing import HealingLimits
from resilient_moe.datapath.parcels import Gone, Result
from resilient_moe.datapath.routes import ExpertsUnreachable
from tests.datapath import fake
from tests.datapath.fake import (
  ALL,
  BATCH,
  DOUBLE,
  EVERYWHERE,
  SHADOWS,
  SINGLE,
  E,
  Scene,
)

# Nothing breaks.


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
  "serving", [SINGLE, DOUBLE, {e: [(0, e)] for e in range(E)}]
)
def test_the_result_is_the_same_wherever_the_experts_are(serving, place, dedup):
  scene = Scene(fake.routes(0, serving), place=place, dedup=dedup)
  scene.check_step()
  assert scene.events == []
  assert scene.exchange.healed == 0
  assert not any(urgent for *_, urgent in scene.links.log)
  tickets = [ticket for _, ticket, *_ in scene.links.log]
  assert tickets == sorted(set(tickets))


def test_nothing_is_sent_for_a_batch_without_tokens():
  h, experts, _ = BATCH
  scene = Scene(fake.routes(0, SINGLE))
  y = scene.exchange.run(0, h, experts, np.zeros(6, bool))
  assert y.shape == (6, 2, 4)
  assert not y.any()
  assert scene.links.log == []


def test_it_is_busy_while_embeddings_are_out():
  scene, seen = Scene(fake.routes(0, SINGLE)), []
  for n in range(4):
    scene.links.script("result", n, lambda: seen.append(scene.exchange.busy))
  assert not scene.exchange.busy
  scene.exchange.run(0, *ALL)
  assert seen == [True] * 4


# Deaths.


@functools.cache
def moments() -> list[tuple[str, int]]:
  scene = Scene(fake.routes(0, DOUBLE, SHADOWS))
  scene.check_step()
  sends = [("send", n) for n in range(len(scene.links.log))]
  return sends + [("result", n) for n in range(scene.links.results)]


@pytest.mark.parametrize("silent", [False, True], ids=["gone", "silent"])
@pytest.mark.parametrize("victim", range(4))
def test_a_death_at_any_moment_changes_nothing(victim, silent):
  healed = 0
  for moment in moments():
    scene = Scene(fake.routes(0, DOUBLE, SHADOWS))
    scene.links.script(*moment, lambda s=scene: s.links.kill(victim, silent))
    scene.check_step()
    healed += bool(scene.told("healed"))
    replays = [sent for sent in scene.links.log if sent[3]]
    assert len(replays) == scene.exchange.healed
    assert all(rank != victim for rank, *_ in replays)
    for facts in scene.told("healed"):
      assert facts["rank"] == victim
  assert healed >= len(moments()) // 4  # the others fell between two layers


def test_only_what_is_owed_is_sent_again():
  scene = Scene(fake.routes(0, SINGLE, SHADOWS))
  scene.links.script("result", 1, lambda: scene.links.kill(3))
  scene.check_run()
  (replay,) = [sent for sent in scene.links.log if sent[3]]
  assert replay[0] == 1  # the shadow of 3 and 7
  assert len(replay[2].slot) == 2
  (facts,) = scene.told("healed")
  seconds = facts.pop("seconds")
  assert facts == {"rank": 3, "layer": 0, "experts": 2}
  assert seconds == pytest.approx(0.0011)  # when the second result came


def test_a_shadow_serves_without_a_push_and_without_waiting():
  scene = Scene(fake.routes(0, SINGLE, SHADOWS))
  scene.links.kill(0)
  scene.check_step()
  assert scene.routes.state() == (0, {(0, 0)})
  assert scene.links.time < HealingLimits().late_s
  assert [f["rank"] for f in scene.told("healed")] == [0]  # known afterwards


def test_a_silent_death_takes_the_probes_that_the_limits_say():
  limits = HealingLimits(late_s=0.1, misses=3)
  scene = Scene(fake.routes(0, SINGLE, SHADOWS), limits=limits)
  scene.links.kill(2, silent=True)
  scene.exchange.run(0, *ALL)
  assert [rank for _, rank in scene.links.probes] == [2, 2, 2]
  times = [at for at, _ in scene.links.probes]
  assert np.diff([0.0, *times]) == pytest.approx(0.1, abs=limits.tick_s)
  (facts,) = scene.told("healed")
  assert facts["seconds"] == pytest.approx(0.3, abs=3 * limits.tick_s)


def test_unanswered_probes_count_only_in_a_row():
  scene = Scene(fake.routes(0, SINGLE), limits=HealingLimits(misses=2))
  replies = iter([False, True, False, True] * 10)
  scene.links.answers = lambda rank: next(replies)
  scene.links.delay_s[1] = 0.3
  scene.check_run()
  assert scene.routes.state() == (0, frozenset())


@pytest.mark.parametrize("silent", [False, True], ids=["gone", "silent"])
@pytest.mark.parametrize("moment", ["send", "result"])
def test_the_rank_that_took_over_dies_too(moment, silent):
  for first, second in np.ndindex(4, 4):
    if first == second:
      continue
    scene = Scene(fake.routes(0, EVERYWHERE))
    kill = scene.links.kill
    scene.links.script("send", 0, lambda k=kill, r=first: k(r, silent))
    # The first replay is the fifth parcel.
    scene.links.script(moment, 4, lambda k=kill, r=second: k(r, silent))
    scene.check_run()


def test_two_deaths_told_at_once_send_nothing_to_the_dead():
  scene = Scene(fake.routes(0, SINGLE, SHADOWS | {0: [(2, 4), (3, 8)]}))
  scene.links.together = True

  def both() -> None:
    scene.links.kill(0)
    scene.links.kill(2)

  scene.links.after(0.0005, both)
  h, live = np.ones((1, 4), np.float32), np.ones(1, bool)
  scene.exchange.run(0, h, np.array([[0]], np.int32), live)
  assert [rank for rank, *_, urgent in scene.links.log if urgent] == [3]


# Waiting for a push.


def test_unreachable_experts_come_back_with_a_push():
  moved = {e: [(r % 3, 8 + e) for r, _ in SINGLE[e]] for e in range(E)}
  tables = fake.routes(0, SINGLE, {3: [(0, 5)]}), fake.routes(1, moved)
  scene = Scene(*tables)
  scene.links.delay_s |= {0: 0.1, 3: 9.0}  # the first comes in meanwhile
  scene.links.after(0.01, lambda: scene.links.kill(3))
  scene.links.after(0.2, lambda: scene.routes.push(tables[1]))
  scene.check_run()
  assert scene.told("unreachable") == [{"layer": 0, "experts": [7]}]
  # The one with a shadow at once, the other after the push.
  replays = [sent[2] for sent in scene.links.log if sent[3]]
  assert [len(parcel.slot) for parcel in replays] == [1, 1]
  healed = scene.told("healed")
  assert [(f["rank"], f["experts"]) for f in healed] == [(3, 1), (3, 1)]
  seconds = [f["seconds"] for f in healed]
  assert seconds == pytest.approx([0.01, 0.2], abs=0.003)


def test_a_push_that_comes_too_late_is_not_waited_for():
  limits = HealingLimits(push_s=0.1)
  scene = Scene(fake.routes(0, SINGLE), limits=limits)
  scene.links.kill(3)
  useless = (fake.routes(e, SINGLE) for e in range(1, 9))
  for i in range(8):  # a push that doesn't help buys no time
    scene.links.after(i * 0.03, lambda: scene.routes.push(next(useless)))
  with pytest.raises(ExpertsUnreachable, match=r"\[3, 7\]") as raised:
    scene.exchange.run(0, *ALL)
  assert raised.value.experts == [3, 7]
  assert not raised.value.masked
  assert scene.links.time == pytest.approx(0.1, abs=2 * limits.tick_s)
  assert not scene.exchange.busy
  assert len(scene.told("unreachable")) == 1


def test_waits_for_several_pushes_add_up():
  tables = [
    fake.routes(0, SINGLE),
    fake.routes(1, SINGLE, incarnations={3: 1}),
    fake.routes(2, SINGLE, incarnations={3: 2}),
  ]
  scene = Scene(*tables, limits=HealingLimits(push_s=0.25))
  links = scene.links

  def again(table, dies_after) -> None:
    links.start(3)
    scene.routes.push(table)
    links.after(dies_after, lambda: links.kill(3))

  links.delay_s[3] = 0.02
  links.kill(3)
  links.after(0.15, lambda: again(tables[1], 0.01))
  links.after(0.31, lambda: again(tables[2], 9.0))
  with pytest.raises(ExpertsUnreachable):
    scene.exchange.run(0, *ALL)
  assert links.time == pytest.approx(0.26, abs=0.02)


def test_a_needed_expert_that_gets_masked_ends_the_step_at_once():
  scene = Scene(fake.routes(0, SINGLE))
  scene.links.kill(3)
  none = SINGLE | {3: [], 7: []}
  push = fake.routes(1, none, masked=(3, 7))
  scene.links.after(0.02, lambda: scene.routes.push(push))
  with pytest.raises(ExpertsUnreachable, match="masked") as raised:
    scene.exchange.run(0, *ALL)
  assert raised.value.experts == [3, 7]
  assert raised.value.masked
  assert scene.links.time <= 0.03


# The end of a step, and what comes after it.


def test_cancel_ends_a_run_within_a_tick_and_reset_lets_the_next_one():
  scene = Scene(fake.routes(0, SINGLE))
  scene.links.delay_s[1] = 10.0
  scene.links.after(0.02, scene.exchange.cancel)
  with pytest.raises(ExchangeCancelled):
    scene.exchange.run(0, *ALL)
  assert scene.links.time <= 0.02 + HealingLimits().tick_s
  assert not scene.exchange.busy
  with pytest.raises(ExchangeCancelled):
    scene.exchange.run(0, *ALL)
  scene.exchange.reset()
  scene.links.delay_s.clear()
  scene.check_run()


def test_cancel_comes_from_another_thread():
  scene = Scene(fake.routes(0, SINGLE))
  scene.links.receive = lambda wait_s: time.sleep(wait_s) or []
  timer = threading.Timer(0.05, scene.exchange.cancel)
  timer.start()
  with pytest.raises(ExchangeCancelled):
    scene.exchange.run(0, *ALL)
  timer.join(5)


def test_a_cancelled_run_leaves_nothing_to_the_next_one():
  scene = Scene(fake.routes(0, SINGLE))
  scene.links.delay_s[1] = 0.02
  scene.links.after(0.005, scene.exchange.cancel)
  with pytest.raises(ExchangeCancelled):
    scene.exchange.run(0, *ALL)
  scene.exchange.reset()
  scene.links.time += 1.0  # the old result has come, the old look is due
  h, experts, live = ALL
  scene.check_run(1, (h + 1, experts, live))
  assert scene.links.probes == []


def test_a_healed_rank_that_answers_after_all_is_ignored():
  scene = Scene(fake.routes(0, SINGLE, SHADOWS))
  scene.links.delay_s |= {1: 0.04, 3: 0.05}
  scene.links.after(0.03, lambda: scene.routes.down(1))
  scene.check_run()
  assert scene.exchange.healed == 1
  returned = sum(
    len(parcel.slot) * parcel.rows[0].nbytes
    for *_, parcel, _ in scene.links.log
  )
  assert scene.exchange.returned_bytes == returned


@pytest.mark.parametrize(
  "spoil", [lambda y: y[:-1], lambda y: y.astype(np.float64)]
)
def test_a_result_that_does_not_fit_its_parcel_is_an_error(spoil):
  scene = Scene(fake.routes(0, SINGLE))

  def receive(wait_s: float, old=scene.links.receive):
    return [
      n if isinstance(n, Gone) else Result(n.rank, n.ticket, spoil(n.y))
      for n in old(wait_s)
    ]

  scene.links.receive = receive
  with pytest.raises(ValueError, match=r"returned .* expected float32\(2, 4\)"):
    scene.exchange.run(0, *ALL)


def test_a_batch_that_does_not_fit_together_is_an_error():
  h, experts, live = ALL
  with pytest.raises(ValueError, match="number of tokens"):
    Scene(fake.routes(0, SINGLE)).exchange.run(0, h[1:], experts, live)


@pytest.mark.parametrize(
  ("kwargs", "says"),
  [
    ({"late_s": 0}, "late_s=0: must be above 0"),
    ({"tick_s": -1.0}, "tick_s=-1.0"),
    ({"push_s": -0.5}, "push_s=-0.5: must be 0"),
    ({"misses": 0}, "misses=0: must be 1"),
    ({"link_s": 0.01}, "link_s=0.01: must be late_s=0.03 or more"),
  ],
)
def test_limits_that_make_no_sense_are_refused(kwargs, says):
  with pytest.raises(ValueError, match=says):
    HealingLimits(**kwargs)


def test_no_wait_for_a_push_is_a_choice():
  assert HealingLimits(push_s=0).push_s == 0
