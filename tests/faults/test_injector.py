"""The injector strikes once, keeps deadlines, and survives a restart."""

import pytest

from resilient_moe.faults import Fault, Injector, Moment


def moment(step: int, t_s: float = 0.0, **more: object) -> Moment:
  return Moment(step=step, t_s=t_s, emitted_tokens=0, **more)


WARNING = Fault("rank_leaving", (2, 5), at_step=3, deadline_s=1.0)


def test_every_fault_strikes_once():
  faults = (
    Fault("rank_lost", (3,), at_step=2),
    Fault("straggler", (1,), at_step=4, slowdown=2.0),
  )
  injector = Injector(faults)
  struck = [injector.poll(moment(step)) for step in range(6)]
  assert struck == [[], [], [faults[0]], [], [faults[1]], []]
  assert injector.finished
  assert injector.lost == {3}


def test_the_loss_follows_the_warning_at_its_deadline():
  injector = Injector((WARNING,))
  assert injector.poll(moment(3, t_s=10.0)) == [WARNING]
  assert injector.poll(moment(4, t_s=10.99)) == []
  assert not injector.finished
  (loss,) = injector.poll(moment(5, t_s=11.0, recovery_actions=1))
  assert (loss.kind, loss.ranks) == ("rank_lost", (2, 5))
  assert injector.poll(moment(6, t_s=12.0)) == []
  assert injector.finished


def test_a_drained_rank_takes_nothing_with_it():
  injector = Injector((WARNING,))
  injector.poll(moment(3, t_s=10.0))
  injector.drained([5])
  (loss,) = injector.poll(moment(5, t_s=11.0))
  assert loss.ranks == (2,)
  assert injector.lost == {2, 5}


def test_a_rank_that_is_gone_is_not_struck_again():
  injector = Injector(
    (
      Fault("rank_lost", (3,), at_step=1),
      Fault("rank_lost", (3, 4), at_step=2),
      Fault("rank_lost", (4,), at_step=3),
    )
  )
  injector.poll(moment(1))
  assert [fault.ranks for fault in injector.poll(moment(2))] == [(4,)]
  assert injector.poll(moment(3)) == []
  assert injector.finished


def test_a_replacement_can_be_struck():
  faults = tuple(Fault("rank_lost", (3,), at_step=step) for step in (1, 2))
  injector = Injector(faults)
  injector.poll(moment(1))
  injector.returned([3])
  assert injector.poll(moment(2)) == [faults[1]]


def test_a_loss_overtakes_the_deadline():
  injector = Injector((WARNING, Fault("rank_lost", (2, 5), at_step=4)))
  injector.poll(moment(3, t_s=10.0))
  assert len(injector.poll(moment(4, t_s=10.5))) == 1
  assert injector.poll(moment(5, t_s=20.0)) == []


def test_a_rank_that_is_stuck_for_good_is_lost():
  injector = Injector(
    (
      Fault("rank_stuck", (3,), at_step=1, resume_s=0.5),
      Fault("rank_stuck", (3,), at_step=2),
      Fault("rank_lost", (3,), at_step=3),
    )
  )
  assert len(injector.poll(moment(1))) == 1
  assert injector.lost == set()
  assert len(injector.poll(moment(2))) == 1
  assert injector.lost == {3}
  assert injector.poll(moment(3)) == []


def test_a_rank_that_somebody_else_killed_is_not_struck():
  injector = Injector((WARNING, Fault("rank_lost", (2, 3), at_step=5)))
  injector.poll(moment(3, t_s=10.0))
  injector.add_lost([2, 7])
  assert injector.lost == {2, 7}
  (loss,) = injector.poll(moment(4, t_s=11.0))
  assert loss.ranks == (5,), "its deadline takes only who is left"
  assert [f.ranks for f in injector.poll(moment(5, t_s=11.5))] == [(3,)]
  injector.returned([2])
  assert injector.lost == {3, 5, 7}


def test_a_link_takes_no_rank_and_goes_with_either_end():
  first = Fault("link_cut", (0, 3), at_step=1)
  later = tuple(
    Fault("link_slow", ends, at_step=3, delay_s=0.1)
    for ends in ((0, 3), (1, 4), (1, 5))
  )
  lost = Fault("rank_lost", (0, 5), at_step=2)
  injector = Injector((first, lost, *later))
  assert injector.poll(moment(1)) == [first]
  assert injector.lost == set()
  injector.poll(moment(2))
  assert injector.poll(moment(3)) == [later[1]]
  assert injector.finished


def test_where_a_rank_is_struck_is_said_when_it_strikes():
  fault = Fault("rank_lost", (2, 3), at_step=2, inside="exchange")
  injector = Injector((Fault("rank_lost", (3,), at_step=1), fault))
  injector.poll(moment(1))
  (struck,) = injector.poll(moment(2))
  assert (struck.ranks, struck.inside) == ((2,), "exchange")


def test_the_store_and_the_supervisor_strike_once_and_take_no_rank():
  kinds = ("store_lost", "supervisor_lost")
  faults = tuple(Fault(kind, (), at_step=2) for kind in kinds)
  injector = Injector(faults)
  assert injector.poll(moment(2)) == list(faults)
  assert injector.poll(moment(3)) == []
  assert injector.lost == set()
  assert injector.finished


@pytest.mark.parametrize("restart_at", range(1, 7))
def test_a_restart_changes_nothing(restart_at):
  """At whichever moment the state travels, the same faults strike."""
  schedule = (
    WARNING,
    Fault("rank_lost", (0,), at_step=2, phase="decode"),
    Fault("rank_lost", (7,), at_tokens=0, during_recovery=1, after_ready=True),
    Fault("store_lost", (), at_step=2),
    Fault("rank_stuck", (4,), at_step=4, resume_s=0.5),
    Fault("rank_stuck", (6,), at_step=4),
    Fault("supervisor_lost", (), at_step=5),
    Fault("link_slow", (1, 3), at_step=4, delay_s=0.1, resume_s=2),
    Fault("rank_lost", (1,), at_step=5, inside="attention"),
  )
  moments = [
    moment(2),
    moment(3, t_s=1.0),
    moment(3, t_s=1.1, recovery_actions=1),
    moment(4, t_s=1.2),
    moment(4, t_s=2.5),
    moment(5, t_s=3.0),
  ]
  straight, injector = Injector(schedule), Injector(schedule)
  for index, now in enumerate(moments, start=1):
    assert injector.poll(now) == straight.poll(now)
    if index == restart_at:
      injector = Injector.from_json(injector.to_json(), ranks=8)
  assert injector.to_json() == straight.to_json()
  assert injector.finished
  assert injector.lost == {0, 1, 2, 5, 6, 7}


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{}", "needed is a JSON object with schedule, fired, leaving, lost"),
    ("[1]", "needed is a JSON object"),
    (
      '{"schedule": [{"kind": "rank_lost", "ranks": [9], "at_step": 1}], '
      '"fired": [], "leaving": [], "lost": []}',
      "rank 9 is out of range",
    ),
  ],
)
def test_a_state_that_is_none_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    Injector.from_json(text, ranks=8)
