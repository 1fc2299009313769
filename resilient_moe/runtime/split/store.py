"""Attention and expert ranks of one process, on a device each.

The same face as `device_store.DeviceStore`, so that one emulated backend
serves both deployments; a "mesh" that runs a step is one attention rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from resilient_moe.datapath.exchange import Exchange
from resilient_moe.datapath.healing import HealingLimits
from resilient_moe.datapath.routes import ExpertRoutes, Routes
from resilient_moe.mesh.executables import Executables, Source
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.recovery import Role
from resilient_moe.runtime.device_store import LostRankError
from resilient_moe.runtime.split.attention import AttentionRank, Step
from resilient_moe.runtime.split.experts import ExpertRank
from resilient_moe.runtime.split.families import programs_of
from resilient_moe.runtime.split.inline import Hook, InlineLinks
from resilient_moe.runtime.split.walk import Asked, Walk
from resilient_moe.runtime.weights import WeightTiers

Tree = dict[str, Any]
OnEvent = Callable[..., None]  # (name, attention rank, **facts)


class SplitStore:
  """Who holds what, and each attention rank's way to the experts."""

  def __init__(
    self,
    shape: InstanceShape,
    devices: Sequence[jax.Device],
    executables: Executables,
    limits: HealingLimits,
    dedup: bool,
  ) -> None:
    self.shape = shape
    self.devices = list(devices)  # by rank
    self.executables = executables
    self._limits, self._dedup = limits, dedup
    self._attention: dict[int, AttentionRank] = {}
    self._experts: dict[int, ExpertRank] = {}
    self._routes: Routes | None = None
    self._exchanges: dict[int, tuple[Exchange, ExpertRoutes]] = {}
    self._traffic: dict[int, tuple[int, int]] = {}  # of those that ended
    self.links = InlineLinks(self._experts)
    self.on_event: OnEvent = lambda name, rank, **facts: None

  # -- contents of a rank

  def add(
    self, rank: int, weights: WeightTiers, held: Sequence[int], role: Role
  ) -> None:
    """Fills a rank for its role; what it holds for another is kept.

    `held`: the expert in each slot; -1: empty.
    """
    device = self.devices[rank]
    programs = programs_of(self.executables, role, device)
    if role == Role.ATTENTION:
      self._attention[rank] = AttentionRank(
        self.shape, device, programs, weights.dense
      )
      if self._routes is not None:
        self._connect(rank)
    else:
      self._experts[rank] = ExpertRank(
        self.shape, device, programs, weights.slots(held), held
      )

  def lose(self, rank: int) -> None:
    """Deletes all that the rank held; any later use of it is an error."""
    self._check(self._attention | self._experts, rank)
    for held in (self._attention, self._experts):
      if rank in held:
        held.pop(rank).delete()
    self._disconnect(rank)
    self.links.end(rank)

  def leave(self, rank: int, role: Role) -> None:
    """The rank gives up what it held for a role."""
    held: dict[int, Any] = self._attention
    if role == Role.ATTENTION:
      self._disconnect(rank)
    else:
      held = self._experts
    held.pop(rank).delete()

  def holds(self, rank: int) -> bool:
    """Whether the rank's memory is there."""
    return rank in self._attention or rank in self._experts

  def attends(self, rank: int) -> bool:
    """Whether it holds KV."""
    return rank in self._attention

  def computes(self, rank: int) -> bool:
    """Whether it holds slots of experts."""
    return rank in self._experts

  def write_slot(
    self, rank: int, slot: int, expert: int, weights: Tree
  ) -> None:
    self._check(self._experts, rank).write_slot(slot, expert, weights)

  def read_slot(self, rank: int, slot: int) -> Tree:
    return self._check(self._experts, rank).read_slot(slot)

  def read_row(self, rank: int, row: int, tokens: int) -> np.ndarray:
    return self._check(self._attention, rank).read_row(row, tokens)

  def write_row(self, rank: int, row: int, kv: np.ndarray) -> None:
    self._check(self._attention, rank).write_row(row, kv)

  def wait(self) -> None:
    """Blocks until everything that was dispatched is done."""
    for attention in self._attention.values():
      attention.wait()
    for expert in self._experts.values():
      expert.wait()

  def warm(self) -> None:
    """Runs every program of every rank once."""
    for expert in self._experts.values():
      expert.warm()
    for attention in self._attention.values():
      attention.warm()

  # -- the routing tables and the steps

  def push(self, routes: Routes) -> None:
    """Every attention rank learns who serves what."""
    self._routes = routes
    for rank, attention in self._attention.items():
      if rank in self._exchanges:
        self._exchanges[rank][1].push(routes)
      else:
        self._connect(rank)
      attention.mask(routes.masked)

  def _connect(self, rank: int) -> None:
    assert self._routes is not None
    table = ExpertRoutes(self._routes)
    exchange = Exchange(
      self.links.of(rank), table, self._limits, place=rank, dedup=self._dedup,
      on_event=lambda name, **facts: self.on_event(name, rank, **facts),
    )  # fmt: skip
    self._exchanges[rank] = exchange, table

  def routes_of(self, rank: int) -> ExpertRoutes:
    """An attention rank's own table."""
    return self._exchanges[rank][1]

  def traffic(self) -> Mapping[int, tuple[int, int]]:
    """Bytes of embeddings that each rank has sent and got back."""
    return self._traffic | {rank: self._moved(rank) for rank in self._exchanges}

  def _moved(self, rank: int) -> tuple[int, int]:
    exchange, _ = self._exchanges[rank]
    sent, returned = self._traffic.get(rank, (0, 0))
    return sent + exchange.sent_bytes, returned + exchange.returned_bytes

  def _disconnect(self, rank: int) -> None:
    if rank in self._exchanges:
      self._traffic[rank] = self._moved(rank)
      del self._exchanges[rank]

  def step(self, rank: int, width: int, ints: np.ndarray, hook: Hook) -> Step:
    """One step of an attention rank; nothing has changed yet."""
    (step,) = self.steps([Asked(rank, width, ints, hook)])
    if isinstance(step, Exception):
      raise step
    return step

  def steps(self, asked: Sequence[Asked]) -> list[Step | Exception]:
    """Steps of several attention ranks, layer by layer together.

    So that an expert rank computes a layer's tokens of all of them at once.
    Nothing has changed yet; what has ended a step stands in its place.
    """
    walks = [
      Walk(self._check(self._attention, a.rank), self._exchanges[a.rank][0], a)
      for a in asked
    ]
    for a in asked:
      self.links.hook(a.rank, a.hook)
    try:
      while any(walk.ended is None for walk in walks):
        for walk in walks:
          walk.attend()
        for walk in walks:
          walk.send()
        for walk in walks:
          walk.receive()
    finally:
      for a in asked:
        self.links.hook(a.rank, None)
    return [walk.outcome() for walk in walks]

  def commit(self, rank: int, step: Step) -> None:
    self._check(self._attention, rank).commit(step)

  def program(self, mesh: tuple[int, ...], width: int) -> tuple[None, Source]:
    """No program belongs to a mesh."""
    del mesh, width
    return None, Source.WARM

  def _check(self, held: Mapping[int, Any], rank: int) -> Any:
    if rank not in held:
      raise LostRankError(f"rank {rank} is gone: its memory can't be used")
    return held[rank]
