"""Where experts lie in peacetime: pure functions of NumPy arrays.

First copies are balanced over the ranks that may hold experts; extra copies
(replicas, or shadows when the table leaves them out) go where they survive:
another rack when there are several, else another host, else another rank.
What to do after a loss is in `rescue.py`.
"""


import numpy as np

from resilient_moe.recovery.checks import expert_ranks
from resilient_moe.recovery.packing import deal, routing_table
from resilient_moe.recovery.view import ClusterView

MAX_TURNS = 64  # arrangements of one round of copies that are tried


def _widest(view: ClusterView, among: np.ndarray) -> np.ndarray:
  """Each rank's failure domain, [N]: the widest that `among` has several of.

  Racks, else hosts, else the ranks themselves.
  """
  for domain in (view.rack, view.host):
    if len(among) and (domain[among] != domain[among[0]]).any():
      return domain
  return np.arange(len(view.status))


def spread_out(
  view: ClusterView, holders: np.ndarray, among: np.ndarray
) -> bool:
  """True unless one domain takes all of `holders` though there are several."""
  domain = _widest(view, among)
  return len(among) < 2 or bool((domain[holders] != domain[holders[0]]).any())


def best_rank(
  view: ClusterView, slots: np.ndarray, expert: int, ranks: np.ndarray
) -> int:
  """The rank for one more copy of `expert`; -1 if none has an empty slot.

  Another rack before another host before another rank; then the emptiest;
  then the next after the first holder, so that one rank's experts have their
  copies on many.
  """
  grid = slots[ranks]
  filled = (grid >= 0).sum(axis=1)
  holds = (grid == expert).any(axis=1)
  may = (filled < grid.shape[1]) & ~holds
  if not may.any():
    return -1
  at = ranks[holds]
  near = 2 * np.isin(view.rack[ranks], view.rack[at]).astype(np.int64)
  near += np.isin(view.host[ranks], view.host[at])
  n = len(ranks)
  start = int(holds.argmax()) + 1 + expert if holds.any() else 0
  score = (near * (grid.shape[1] + 1) + filled) * n
  score += (np.arange(n) - start) % n
  return int(ranks[np.where(may, score, np.iinfo(np.int64).max).argmin()])


def place(
  view: ClusterView,
  slots_per_rank: int,
  extra: int = 0,
  load: np.ndarray | None = None,
) -> np.ndarray:
  """Slots [N, S] for a start: every expert once, then `extra` copies.

  Extra copies go round by round over the experts, the most loaded first
  (`load` [E]; index order without it). Copies that can't be placed on another
  rank are left out.

  Raises:
    ValueError: the experts don't fit.
  """
  ranks, n = expert_ranks(view), view.n_experts
  if n > slots_per_rank * len(ranks):
    raise ValueError(
      f"{n} experts don't fit in {len(ranks)} ranks x {slots_per_rank} slots"
    )
  experts = np.arange(n)
  position = experts * len(ranks) // n
  slot = experts - np.searchsorted(position, position)
  slots = np.full((len(view.status), slots_per_rank), -1, np.int32)
  slots[ranks[position], slot] = experts
  first = slots >= 0
  order = extra_copies(n, extra, load)
  for start in range(0, extra, n):
    _add_round(view, slots, order[start : start + n], ranks, first)
  slots.setflags(write=False)
  return slots


def extra_copies(
  n_experts: int, extra: int, load: np.ndarray | None = None
) -> np.ndarray:
  """Which experts get the `extra` copies, most loaded first, [extra]."""
  weight = np.zeros(n_experts) if load is None else -np.asarray(load, float)
  order = np.argsort(weight, kind="stable")
  return order[np.arange(extra) % n_experts]


def _add_round(
  view: ClusterView,
  slots: np.ndarray,
  experts: np.ndarray,
  ranks: np.ndarray,
  first: np.ndarray,
) -> None:
  """Writes one more copy of each of `experts` [.] into `slots` [N, S].

  All at once to the emptiest ranks, turned until (nearly) nobody lies beside
  its own copy; those few one by one.
  """
  filled = (slots[ranks] >= 0).sum(axis=1)
  seats = deal(filled, slots.shape[1] - filled, len(experts))
  experts, seats = experts[: len(seats)], ranks[seats]
  holders = _holders(view, slots, experts, ranks)
  good = np.zeros(len(seats), bool)
  for turn in range(min(len(seats), MAX_TURNS)):
    turned = np.roll(seats, -turn)
    fits = _survives(view, holders, turned, ranks)
    if fits.sum() > good.sum():
      good, chosen = fits, turned
    if good.all():
      break
  for i in np.flatnonzero(good).tolist():
    slots[chosen[i], (slots[chosen[i]] < 0).argmax()] = experts[i]
  for expert in experts[~good].tolist():
    _add_copy(view, slots, expert, ranks, first)


def _holders(
  view: ClusterView,
  slots: np.ndarray,
  experts: np.ndarray,
  ranks: np.ndarray,
) -> np.ndarray:
  """Which ranks hold each of `experts` [.], [., C]; the first one pads."""
  most = int(np.bincount(slots[slots >= 0]).max())
  table = routing_table(slots, ranks, view.n_experts, most)
  holders = table.entries[experts, :, 0]
  return np.where(holders < 0, holders[:, :1], holders)


def _survives(
  view: ClusterView,
  holders: np.ndarray,
  seats: np.ndarray,
  ranks: np.ndarray,
) -> np.ndarray:
  """Whether one more copy on `seats` [.] outlives any one domain, [.]."""
  domain = _widest(view, ranks)
  beside = (holders == seats[:, None]).any(axis=1)
  apart = (domain[holders] != domain[seats][:, None]).any(axis=1)
  return ~beside & apart


def _add_copy(
  view: ClusterView,
  slots: np.ndarray,
  expert: int,
  ranks: np.ndarray,
  first: np.ndarray,
) -> None:
  """Writes one more copy of `expert` into `slots` [N, S], if it can."""
  rank = best_rank(view, slots, expert, ranks)
  holders = ranks[(slots[ranks] == expert).any(axis=1)]
  survives = rank >= 0 and spread_out(view, np.append(holders, rank), ranks)
  if not survives and _swap_in(view, slots, expert, ranks, first):
    return
  if rank >= 0:
    slots[rank, (slots[rank] < 0).argmax()] = expert


def _swap_in(
  view: ClusterView,
  slots: np.ndarray,
  expert: int,
  ranks: np.ndarray,
  first: np.ndarray,
) -> bool:
  """Moves another extra copy aside to make room where it survives.

  The last copies placed can find only slots beside their own; some other
  extra copy may like those. `first` [N, S] bool: copies that stay.
  """
  empty = ranks[(slots[ranks] < 0).any(axis=1)]
  holders = ranks[(slots[ranks] == expert).any(axis=1)]
  at, slot = np.nonzero((slots >= 0) & ~first)
  domain = _widest(view, ranks)
  good = _apart(domain[holders], domain[at])
  good &= ~np.isin(at, holders) & (slots[at, slot] != expert)
  for rank, seat in zip(at[good].tolist(), slot[good].tolist(), strict=True):
    moved = slots[rank, seat]
    others = ranks[(slots[ranks] == moved).any(axis=1)]
    fits = _apart(domain[others[others != rank]], domain[empty])
    fits &= ~(slots[empty] == moved).any(axis=1)
    if fits.any():
      other = empty[fits.argmax()]
      slots[other, (slots[other] < 0).argmax()] = moved
      slots[rank, seat] = expert
      return True
  return False


def _apart(held: np.ndarray, new: np.ndarray) -> np.ndarray:
  """Whether domains `held` [.] and one of `new` [n] are several, [n] bool."""
  if len(held) and (held != held[0]).any():
    return np.ones(len(new), bool)
  return new != held[0] if len(held) else np.zeros(len(new), bool)
