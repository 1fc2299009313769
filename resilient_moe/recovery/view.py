"""What a policy sees: the cluster as it is left, as plain read-only arrays.

Letters (DESIGN section 3): `N` ranks that the run has ever known (alive, spare
or lost; a rank's id is its index), `R` ranks in the mesh, `S` physical slots a
rank, `E` logical experts, `C` copies of an expert at most, `Q` requests.
No JAX here: the same view serves 8 virtual devices and 10,240 simulated ones.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence

import numpy as np

Ranks = Sequence[int] | np.ndarray  # ids of ranks


class Status(enum.IntEnum):
  """What a rank is to the instance."""

  SERVING = 0  # member of the mesh
  SPARE = 1  # healthy, holds its memory, serves nothing
  LAUNCHING = 2  # a replacement on its way
  LOST = 3  # fenced or dead; never read from again


class Role(enum.IntEnum):
  """What a serving rank does (DESIGN section 3, deployment)."""

  COLLOCATED = 0
  ATTENTION = 1
  EXPERT = 2


class Tier(enum.StrEnum):
  """Where bytes come from, nearest first."""

  LOCAL = "local"  # own memory
  PEER = "peer"  # another device of the instance
  HOST = "host"  # memory of the own host
  STORE = "store"  # a remote host or checkpoint store
  DISK = "disk"  # the orbax checkpoint


@dataclasses.dataclass(frozen=True)
class RoutingTable:
  """Logical expert -> the physical slots that serve it."""

  entries: np.ndarray  # [E, C, 2] int32 (rank, slot); -1 pads the copies

  def copies(self) -> np.ndarray:
    """Live copies of each expert, [E] int32."""
    return (self.entries[:, :, 0] >= 0).sum(axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class RequestTable:
  """The requests that are in flight or queued, one row each."""

  request_id: tuple[str, ...]  # Q names
  rank: np.ndarray  # [Q] int32; -1: queued
  prompt_tokens: np.ndarray  # [Q] int32
  emitted_tokens: np.ndarray  # [Q] int32
  kv_tokens: np.ndarray  # [Q] int32 positions whose KV the rank holds
  checkpoint_tokens: np.ndarray  # [Q] int32 positions committed elsewhere
  checkpoint_rank: np.ndarray  # [Q] int32 who holds them; -1: no rank (host)

  def on(self, ranks: Ranks) -> np.ndarray:
    """Indices of the requests that sit on any of `ranks`, [.] int64."""
    return np.flatnonzero(np.isin(self.rank, np.asarray(ranks, np.int32)))


def no_requests() -> RequestTable:
  """An empty request table."""
  empty = np.zeros((0,), np.int32)
  return RequestTable((), empty, empty, empty, empty, empty, empty)


@dataclasses.dataclass(frozen=True)
class ClusterView:
  """What is left of the cluster, and what it holds.

  A *ready* or *cached* mesh is named by the ranks of `launched` that are
  absent from it (`absent`), so that the name stays small at 10,240 ranks.
  """

  epoch: int
  status: np.ndarray  # [N] int8 Status
  role: np.ndarray  # [N] int8 Role
  home: np.ndarray  # [N] int8 Role that each rank was started in
  host: np.ndarray  # [N] int32 failure domain: host
  rack: np.ndarray  # [N] int32 failure domain: rack
  launched: tuple[int, ...]  # the ranks of the first mesh
  mesh: np.ndarray  # [R] int32 ranks in mesh order
  slots: np.ndarray  # [N, S] int32 expert in each slot; -1: empty
  table: RoutingTable
  masked: np.ndarray  # [E] bool experts hidden from the gate
  in_host_memory: np.ndarray  # [E] bool a live host keeps a copy
  on_disk: bool  # a checkpoint can be read
  ready: frozenset[frozenset[int]]  # meshes that have run every program once
  cached: frozenset[frozenset[int]]  # meshes whose executables are stored
  executable: frozenset[int] | None  # the mesh whose programs are current
  rows_per_rank: int  # batch rows (KV slots) reserved on a rank
  top_k: int  # experts a token needs
  expert_bytes: int  # weights of one expert, all layers
  token_kv_bytes: int  # KV of one token, all layers
  requests: RequestTable

  @property
  def n_experts(self) -> int:
    return int(self.masked.shape[0])

  @property
  def slots_per_rank(self) -> int:
    return int(self.slots.shape[1])

  @property
  def disaggregated(self) -> bool:
    """Attention and experts are apart: no program spans two ranks."""
    return bool((self.role != Role.COLLOCATED).any())

  def alive(self) -> np.ndarray:
    """[N] bool: the rank's memory may be read."""
    return (self.status == Status.SERVING) | (self.status == Status.SPARE)

  def free_rows(self) -> np.ndarray:
    """[N] int32: KV rows free on each rank (0 on ranks outside the mesh)."""
    free = np.zeros(self.status.shape, np.int32)
    free[self.mesh[self.role[self.mesh] != Role.EXPERT]] = self.rows_per_rank
    held = self.requests.rank[self.requests.rank >= 0]
    np.subtract.at(free, held, 1)
    free[self.status != Status.SERVING] = 0
    return free


def absent(launched: tuple[int, ...], mesh: Ranks) -> frozenset[int]:
  """The name of a mesh: which launched ranks it lacks, and spares as ~rank.

  A spare that joined is named by its complement (`~rank`, negative), so that
  "3 left, 8 came" and "3 left" are different meshes.
  """
  before, now = _ids(launched), np.asarray(mesh, np.int64)
  size = max(before.max(initial=-1), now.max(initial=-1)) + 1
  was, is_in = np.zeros(size, bool), np.zeros(size, bool)
  was[before] = True
  is_in[now] = True
  gone, came = np.flatnonzero(was & ~is_in), np.flatnonzero(is_in & ~was)
  return frozenset(gone.tolist()) | frozenset((~came).tolist())


def mesh_named(launched: tuple[int, ...], name: frozenset[int]) -> np.ndarray:
  """The mesh that `absent` names, in its one order, [R] int32.

  The order follows from the name, so that a ready or stored executable found
  by name fits: joiners, ascending, take the places of those who left; who is
  over is appended; places left over close up.
  """
  order = _ids(launched).astype(np.int32)
  joined = np.array(sorted(~r for r in name if r < 0), np.int32)
  holes = np.flatnonzero(np.isin(order, [r for r in name if r >= 0]))
  filled = min(len(holes), len(joined))
  order[holes[:filled]] = joined[:filled]
  order = np.delete(order, holes[filled:])
  return np.concatenate([order, joined[filled:]])


@functools.lru_cache(maxsize=64)
def _ids(launched: tuple[int, ...]) -> np.ndarray:
  """`launched` as a read-only array, [.] int64; 10,240 ints take a while."""
  ids = np.array(launched, np.int64)
  ids.setflags(write=False)
  return ids
