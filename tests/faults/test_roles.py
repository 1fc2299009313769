"""Which faults fit which ranks, where not all ranks do the same."""

import pytest

from resilient_moe.faults import Fault, check_roles

CUT = Fault("link_cut", (1, 2), at_step=3)
SLOW = Fault("link_slow", (0, 5), at_step=3, delay_s=0.1)
LOST = Fault("rank_lost", (0, 5), at_step=3)


def struck(inside: str, *ranks: int) -> tuple[Fault, ...]:
  return tuple(
    Fault(kind, ranks, at_step=3, inside=inside)
    for kind in ("rank_lost", "rank_stuck")
  )


@pytest.mark.parametrize(
  "schedule",
  [
    (CUT, SLOW, LOST, Fault("store_lost", (), at_step=3)),
    struck("attention", 0, 1),
    struck("experts", 2, 5),
    struck("exchange", 1, 2),
  ],
)
def test_what_fits_is_returned(schedule):
  assert check_roles(schedule, 2, 6) == schedule


def test_a_collocated_deployment_has_no_roles():
  assert check_roles((LOST,), 0, 6) == (LOST,)
  assert check_roles((), 0, 1) == ()


@pytest.mark.parametrize(
  ("fault", "attention", "message"),
  [
    (CUT, 1, r"ranks is \(1, 2\); .* from 0 to 0, the second from 1 to 5"),
    (CUT, 3, r"ranks is \(1, 2\); .* from 0 to 2, the second from 3 to 5"),
    (
      Fault("link_cut", (2, 1), at_step=3),
      2,
      r"'link_cut': ranks is \(2, 1\); needed is \(attention rank, expert",
    ),
    (CUT, 0, r"'link_cut' of ranks \(1, 2\) .* disaggregated .* rank_lost,"),
    (struck("exchange", 1)[0], 0, "inside='exchange' needs a disaggregated"),
    (struck("attention", 1, 2)[0], 2, "strike rank 2; .* from ranks 0 to 1"),
    (struck("experts", 2, 1)[1], 2, "'rank_stuck': .* rank 1; .* ranks 2 to 5"),
    (Fault("rank_lost", (6,), at_step=3), 2, "rank 6 is out of range; 6 ranks"),
    (Fault("link_cut", (1, 6), at_step=3), 2, "rank 6 is out of range"),
    (LOST, 6, r"attention is 6; .* choose from 1 to 5, or 0 \(collocated\)"),
    (LOST, -1, "attention is -1; of 6 ranks at least one attends"),
    (LOST, 2.0, "attention is 2.0"),
  ],
)
def test_what_does_not_fit_is_refused(fault, attention, message):
  with pytest.raises(ValueError, match=message):
    check_roles((CUT, fault) if attention == 2 else (fault,), attention, 6)
