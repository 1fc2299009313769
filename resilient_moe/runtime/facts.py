"""What a backend knows to be so: the source of its views.

Kept apart from `recovery.semantics.advance`, which says what *should* be so
after an action; tests hold the two equal after every action of a run.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from resilient_moe.recovery import (
  ClusterView,
  Role,
  RoutingTable,
  Status,
  absent,
)


class Facts:
  """The membership, slots and table of an instance, as they are."""

  def __init__(self, view: ClusterView) -> None:
    self._view = view

  @property
  def view(self) -> ClusterView:
    return self._view

  @property
  def mesh(self) -> tuple[int, ...]:
    return tuple(self._view.mesh.tolist())

  def _set(self, **fields: Any) -> None:
    for value in fields.values():
      if isinstance(value, np.ndarray):
        value.setflags(write=False)
    self._view = dataclasses.replace(self._view, **fields)

  def next_epoch(self) -> int:
    self._set(epoch=self._view.epoch + 1)
    return self._view.epoch

  def lost(self, ranks: Iterable[int]) -> None:
    """These ranks' memory is gone: nothing is in their slots."""
    ranks = list(ranks)
    status, slots = self._view.status.copy(), self._view.slots.copy()
    status[ranks] = Status.LOST
    slots[ranks] = -1
    self._set(status=status, slots=slots)
    self._unroute(lambda rank, slot: np.isin(rank, ranks))

  def meshed(self, ranks: tuple[int, ...]) -> None:
    """`ranks` serve, other live ones stand by."""
    view = self._view
    status = np.where(view.alive(), np.int8(Status.SPARE), view.status)
    status[list(ranks)] = Status.SERVING
    changed = set(ranks) != set(self.mesh)
    name = absent(view.launched, ranks)
    self._set(
      status=status, mesh=np.array(ranks, np.int32),
      epoch=view.epoch + int(changed),
      executable=name if name == view.executable else None,
    )  # fmt: skip
    self._unroute(lambda rank, slot: ~np.isin(rank, ranks))

  def launching(self, rank: int) -> None:
    """A replacement is on its way: another device, nothing made ready."""
    self.role(rank, Role(self._view.home[rank]))
    view = self._view
    status = view.status.copy()
    status[rank] = Status.LAUNCHING
    first = rank in view.launched
    ready = {n for n in view.ready if (rank in n if first else ~rank not in n)}
    self._set(status=status, ready=frozenset(ready))

  def filled(self, rank: int, slot: int, expert: int) -> None:
    """A slot was written; if it served, it doesn't any more."""
    slots = self._view.slots.copy()
    slots[rank, slot] = expert
    self._set(slots=slots)
    self._unroute(lambda r, s: (r == rank) & (s == slot))

  def routed(self, table: RoutingTable) -> None:
    masked = self._view.masked & (table.copies() == 0)
    self._set(table=table, masked=masked)

  def hidden(self, experts: Iterable[int]) -> None:
    masked = self._view.masked.copy()
    masked[list(experts)] = True
    entries = self._view.table.entries.copy()
    entries[masked] = -1
    self._set(masked=masked, table=RoutingTable(entries))

  def ready(self, name: frozenset[int], current: bool) -> None:
    """A mesh's programs have run once; perhaps they are the current ones."""
    fields: dict[str, Any] = {"ready": self._view.ready | {name}}
    if current:
      fields["executable"] = name
    self._set(**fields)

  def stored(self, name: frozenset[int]) -> None:
    self._set(cached=self._view.cached | {name})

  def role(self, rank: int, role: Role) -> None:
    roles = self._view.role.copy()
    roles[rank] = role
    self._set(role=roles)
    if role == Role.ATTENTION:
      slots = self._view.slots.copy()
      slots[rank] = -1
      self._set(slots=slots)
      self._unroute(lambda r, slot: r == rank)

  def _unroute(
    self, gone: Callable[[np.ndarray, np.ndarray], np.ndarray]
  ) -> None:
    """Drops table entries, keeping live copies in front."""
    entries = self._view.table.entries
    rank, slot = entries[:, :, 0], entries[:, :, 1]
    hit = gone(rank, slot) & (rank >= 0)
    entries = np.where(hit[:, :, None], -1, entries)
    order = np.argsort(entries[:, :, 0] < 0, axis=1, kind="stable")
    entries = np.take_along_axis(entries, order[:, :, None], axis=1)
    self._set(table=RoutingTable(entries.astype(np.int32)))
