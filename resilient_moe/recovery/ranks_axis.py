"""Who serves after a failure: survivors, a standing spare, a restart."""

import itertools

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.checks import expert_ranks, request_ranks
from resilient_moe.recovery.choices import Actions, Ranks, Reserve
from resilient_moe.recovery.packing import slots_needed
from resilient_moe.recovery.policy import DEPLOYMENTS, Infeasible
from resilient_moe.recovery.view import (
  ClusterView,
  Role,
  Status,
  absent,
  mesh_named,
)

READY = ("none", "singles", "all")


def survivors(
  losses: int = 1, ready: str = "singles", replace: bool = False
) -> Ranks:
  """Whoever is left serves; slots and rows are kept for `losses` ranks.

  `ready`: the meshes made ready in peacetime: of every single loss, of all
  up to `losses`, or none. `replace`: replacements start behind traffic.
  """

  def reserve(view: ClusterView) -> Reserve:
    return _reserve(view, losses, ready)

  return Ranks(reserve, _who_is_left, replace=replace)


def restart(cache: bool, losses: int = 1) -> Ranks:
  """Everything stops; a fresh instance on whoever is left serves on.

  `cache`: executables of the full mesh and of every single loss are compiled
  in peacetime and kept on disk. Shapes are those of `survivors(losses)`.
  """

  def reserve(view: ClusterView) -> Reserve:
    return _reserve(view, losses, "singles" if cache else "none")

  def mesh(
    view: ClusterView, leaving: tuple[int, ...]
  ) -> np.ndarray | Infeasible:
    if not view.on_disk:
      return Infeasible("a restart needs a checkpoint on disk; there is none")
    spares = np.flatnonzero(view.status == Status.SPARE)
    if len(_members(view, leaving)):
      spares = spares[:0]
    left = np.append(_members(view, leaving), np.setdiff1d(spares, leaving))
    # Its processes start in the roles of the first ones.
    return _mesh_of(view, left.astype(np.int64), view.home)

  return Ranks(reserve, mesh, restart=True, cache=cache)


def spare(count: int = 1, ready: str = "singles") -> Ranks:
  """`count` devices stand by; the next takes the place of a rank that left.

  Only where every rank does both: a spare has no role.
  Once they are used up this is infeasible. With fewer spares than losses the
  survivors close up, if experts fit.
  """

  def reserve(view: ClusterView) -> Reserve:
    spares = np.flatnonzero(view.status == Status.SPARE)[:1]
    names = (
      frozenset({r, *(~int(s) for s in spares)}) for r in view.mesh.tolist()
    )
    made = () if _known_ready(ready) == "none" else tuple(names)
    return Reserve(0, 0, made)

  def mesh(
    view: ClusterView, leaving: tuple[int, ...]
  ) -> np.ndarray | Infeasible:
    left = _members(view, leaving)
    free = np.flatnonzero(view.status == Status.SPARE)
    free = np.setdiff1d(free, leaving)[: len(view.launched) - len(left)]
    if len(left) < len(view.mesh) and not len(free):
      return Infeasible(f"0 of {count} spares are left; a loss needs 1")
    name = absent(view.launched, np.append(left, free))
    return mesh_named(view.launched, name)

  return Ranks(reserve, mesh, spares=count, deployments=DEPLOYMENTS[:1])


def role_switch(losses: int = 1, replace: bool = False) -> Ranks:
  """An attention rank takes the place of a lost expert rank.

  Only where no free slots are left for its experts; the one with the fewest
  requests, as long as another one attends. Rows are kept for `losses`
  attention ranks, slots for none.
  """

  def reserve(view: ClusterView) -> Reserve:
    return Reserve(0, _lost_rows(view, losses), ())

  return Ranks(
    reserve, _who_is_left, switch=_switch, replace=replace,
    deployments=DEPLOYMENTS[1:],
  )  # fmt: skip


def _switch(
  view: ClusterView, leaving: tuple[int, ...]
) -> Actions:
  """As many attention ranks as the slots of lost experts need."""
  holders = np.setdiff1d(expert_ranks(view), leaving)
  holders = holders[view.status[holders] == Status.SERVING]
  held = view.slots[holders]
  homeless = view.n_experts - len(np.unique(held[held >= 0]))
  short = homeless - int((held < 0).sum())
  needed = slots_needed(max(short, 0), max(view.slots_per_rank, 1))
  attend = np.setdiff1d(request_ranks(view), leaving)
  attend = attend[view.status[attend] == Status.SERVING]
  sitting = view.requests.rank[view.requests.rank >= 0]
  seated = np.bincount(sitting, minlength=len(view.status))[attend]
  emptiest = attend[np.argsort(seated, kind="stable")]
  return tuple(
    act.SwitchRole(int(rank), Role.EXPERT)
    for rank in emptiest[: max(min(needed, len(attend) - 1), 0)]
  )


def _lost_rows(view: ClusterView, losses: int) -> int:
  """Attention ranks whose rows are kept; one must be left."""
  attend = len(request_ranks(view))
  return min(losses, attend - 1) if view.disaggregated else losses


def _reserve(view: ClusterView, losses: int, ready: str) -> Reserve:
  n = len(expert_ranks(view))
  if not 0 <= losses < n and losses:
    raise ValueError(f"losses={losses}: of {n} ranks at most {n - 1} may go")
  if view.disaggregated:
    _known_ready(ready)
    return Reserve(losses, _lost_rows(view, losses), ())
  together = {"none": 0, "singles": min(losses, 1), "all": losses}
  names = (
    frozenset(gone)
    for f in range(1, together[_known_ready(ready)] + 1)
    for gone in itertools.combinations(view.mesh.tolist(), f)
  )
  return Reserve(losses, losses, tuple(names))


def _known_ready(ready: str) -> str:
  if ready not in READY:
    raise ValueError(f"ready={ready!r}; choices: {', '.join(READY)}")
  return ready


def _members(view: ClusterView, leaving: tuple[int, ...]) -> np.ndarray:
  """Members of the mesh that live and stay, [.]."""
  live = view.mesh[view.status[view.mesh] == Status.SERVING]
  return live[~np.isin(live, leaving)]


def _who_is_left(
  view: ClusterView, leaving: tuple[int, ...]
) -> np.ndarray | Infeasible:
  return _mesh_of(view, _members(view, leaving), view.role)


def _mesh_of(
  view: ClusterView, left: np.ndarray, role: np.ndarray
) -> np.ndarray | Infeasible:
  """The mesh of `left` [.], if their `role` [N] leaves nothing undone."""
  for other, work in ((Role.EXPERT, "requests"), (Role.ATTENTION, "experts")):
    if not (role[left] != other).any():
      return Infeasible(
        f"0 of {len(view.mesh)} ranks are left for {work}; at least 1"
      )
  return mesh_named(view.launched, absent(view.launched, left))
