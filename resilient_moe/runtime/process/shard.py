"""One rank's arrays, and what is done with them in its process.

The public methods are what the supervisor's calls name (`wire.Call`), but for
`abort` and `shut`: those are for the thread that listens to its control.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from resilient_moe.mesh.executables import Executables, Source
from resilient_moe.model.step import request_kv_shape
from resilient_moe.recovery.actions import Move
from resilient_moe.recovery.view import Tier
from resilient_moe.runtime.device_store import DeviceStore
from resilient_moe.runtime.process import private
from resilient_moe.runtime.process.data import (
  DRAIN_S,
  DataClient,
  DataServer,
  PullFailed,
)
from resilient_moe.runtime.process.mirror import KVMirror
from resilient_moe.runtime.process.probe import Responder
from resilient_moe.runtime.process.stream import KVStream
from resilient_moe.runtime.process.wire import (
  Address,
  Found,
  Member,
  Setup,
  Up,
)
from resilient_moe.runtime.readiness import COMPILED_POLL_S
from resilient_moe.runtime.stages import Stages
from resilient_moe.runtime.weights import WeightTiers, tree_bytes

Mesh = tuple[int, ...]


class Shard:
  """The store of one rank, its mirror of others, and its own stream."""

  say: Callable[[Found], None]  # unused: it finds nothing out by itself

  def __init__(
    self, rank: int, setup: Setup, authkey: bytes, host: str
  ) -> None:
    """`host`: the address under which others reach this process."""
    self._rank, self._setup, self._authkey = rank, setup, authkey
    self._incarnations = dict(setup.incarnations)
    seconds: dict[str, float] = {}  # of each stage
    stages = Stages(seconds.__setitem__)
    self._host = host
    private.configure(setup.n_devices, host, setup.platform)
    again = setup.incarnations[rank] > 0
    private.join(
      setup.coordinator, len(setup.numbers), setup.numbers[rank], again
    )
    self._locals = {
      r: private.local_devices(n) for r, n in setup.numbers.items()
    }
    stages.done("join")
    self.weights = WeightTiers(
      setup.checkpoint, setup.shape.config.dtype, setup.host_weights
    )
    stages.done("weights")
    self._connections = private.Connections()
    self._clients: dict[Address, DataClient] = {}
    self._routing: dict | None = None
    self._placed: Any = None  # the routing arrays on the device
    self._delta: Any = None  # of the last step, until it is committed
    self._commit_s = 0.0  # of the step before
    self._build()
    stages.done("placing")
    self._serve_data()
    responder = Responder.start(host, setup.probes)
    self.weights.filled()
    self.up = Up(
      self._server.address, responder.port, responder.native,
      tree_bytes(self.weights.dense),
      self.weights.host_bytes, seconds,
    )  # fmt: skip

  def _build(self) -> None:
    setup = self._setup
    executables = Executables(setup.shape, setup.store)
    while not executables.has_rank_programs():
      time.sleep(COMPILED_POLL_S)  # one process compiles them for everybody
    # By rank; a rank that has no process yet stands for itself.
    own = self._device(self._rank)
    size = max(max(self._incarnations), self._rank) + 1
    devices = [
      self._device(r) if r in self._locals else own for r in range(size)
    ]
    self.store = DeviceStore(setup.shape, devices, executables)
    held = self.weights.slots(setup.slots)
    self.store.add(self._rank, self.weights.dense, held)
    self.store.warm_rank_programs()

  def _device(self, rank: int) -> jax.Device:
    mine = self._locals[rank]
    # Only virtual devices are as many as the processes that a rank can be.
    return mine[min(self._incarnations[rank], len(mine) - 1)]

  def _serve_data(self) -> None:
    setup, config = self._setup, self._setup.shape.config
    self._mirror = None
    if setup.mirrors:
      shape = request_kv_shape(config, setup.shape.options)
      self._mirror = KVMirror(shape, config.dtype)
    self._server = DataServer(
      self._host, self._authkey, self._mirror,
      {"slot": self._read_slot, "row": self._read_row},
    )  # fmt: skip
    self._stream: KVStream | None = None
    self._warnings: list[str] = []
    if setup.streams:
      self._stream = KVStream(
        self._rank, self._authkey, self._warnings.append
      )

  # -- membership

  def members(self, incarnations: dict[int, int]) -> None:
    """Which process is which rank from here on."""
    self._incarnations.update(incarnations)
    for rank in incarnations:
      if rank in self._locals:
        self.store.devices[rank] = self._device(rank)
    self.store.unbind()
    self._placed = None

  def _key(self, mesh: Mesh) -> tuple[Member, ...]:
    return tuple((r, self._incarnations[r]) for r in mesh)

  def abort(self, gone: tuple[Member, ...]) -> None:
    """Nobody waits for these any more, once all wait."""
    self._connections.forsake(gone)
    private.wait_quiet()

  def shut(self) -> None:
    """Ends the collectives with processes that are gone."""
    self._connections.abort()

  def connections(self) -> int:
    """Sockets of this process that meshes keep open."""
    return self._connections.count()

  # -- programs

  def load(self, mesh: Mesh) -> str:
    """Loads a mesh's step programs; where they came from."""
    sources = [
      self.store.program(mesh, w)[1] for w in self._setup.shape.chunks()
    ]
    return str(max(sources, key=list(Source).index))

  def ready(self, mesh: Mesh, width: int, routing: dict) -> None:
    """Runs one program of a mesh on idle rows."""
    self._connections.made_by(
      self._key(mesh), lambda: self.store.make_ready(mesh, width, routing)
    )

  def routing(self, routing: dict) -> None:
    """The routing arrays of the mesh that serves."""
    self._routing, self._placed = routing, None

  def step(self, mesh: Mesh, width: int, ints: np.ndarray) -> tuple:
    """One step: own tokens [1, B + 1], seconds without and with collectives.

    Behind them what is to be said of the stream (`_refused`).
    """
    start = time.monotonic()
    if self._placed is None:
      assert self._routing is not None
      self._placed = self.store.put_routing(mesh, self._routing)
    launched = time.monotonic()
    delta, tokens, packed = self._connections.made_by(
      self._key(mesh),
      lambda: self.store.run(mesh, width, self._placed, ints),
    )
    end = time.monotonic()
    self._delta = (mesh, width, delta, packed)
    own_s, self._commit_s = launched - start + self._commit_s, 0.0
    return tokens, own_s, end - launched, *self._refused()

  def commit(self, segments: list, retired: tuple[str, ...]) -> None:
    """The step counts: its delta goes into the cache and to the mirror."""
    (mesh, width, delta, packed), self._delta = self._delta, None
    start = time.monotonic()
    self.store.commit(mesh, width, delta, packed)
    self._commit_s = time.monotonic() - start
    self._to_mirrors(segments, delta, retired)

  # -- weights and KV

  def fill(self, fills: list[dict[str, Any]]) -> int:
    """Experts' weights into slots; bytes."""
    return sum(self._fill(**fill) for fill in fills)

  def _fill(
    self, slot: int, expert: int, tier: str, source: tuple[Address, int] | None
  ) -> int:
    if tier == Tier.LOCAL:
      assert source is not None
      tree = self.store.read_slot(self._rank, source[1])
    elif tier == Tier.PEER:
      assert source is not None
      leaves = self._client(source[0]).pull("slot", source[1])
      tree = jax.tree.unflatten(self.weights.structure, leaves)
    else:
      move = Move(expert, self._rank, slot)
      tree = self.weights.read([move], Tier(tier), _no_peer)[expert]
    self.store.write_slot(self._rank, slot, tree)
    self.store.wait()
    return tree_bytes(tree)

  def rows(
    self, rows: list[dict[str, Any]]
  ) -> list[tuple[str, int, int, str]]:
    """KV of requests into rows: (request, positions, bytes, why not)."""
    said = []
    for fields in rows:
      name = fields.pop("request_id")
      try:
        said.append((name, *self._row(**fields), ""))
      except (ConnectionError, PullFailed) as error:
        said.append((name, 0, 0, str(error)))
    return said

  def _row(
    self, row: int, what: str, address: Address, args: tuple
  ) -> tuple[int, int]:
    """Pulls a request's KV [L, 2K, tokens, d] into a row."""
    if address == self._server.address and what == "kv":
      assert self._mirror is not None
      kv = self._mirror.get(*args)
    else:
      [kv] = self._client(address).pull(what, *args)
    if kv is None:
      return 0, 0
    self.store.write_row(self._rank, row, kv)
    self.store.wait()
    return kv.shape[2], kv.nbytes

  def _client(self, address: Address) -> DataClient:
    if address not in self._clients:
      self._clients[address] = DataClient(address, self._authkey)
    return self._clients[address]

  def _read_slot(self, slot: int) -> list[np.ndarray]:
    return jax.tree.leaves(self.store.read_slot(self._rank, slot))

  def _read_row(self, row: int, tokens: int) -> list[np.ndarray]:
    return [self.store.read_row(self._rank, row, tokens)]

  def done(self) -> int:
    """All calls before this one are done; KV bytes streamed so far."""
    self.store.wait()
    return self._stream.bytes_sent if self._stream is not None else 0

  # -- KV checkpoints

  def stream_to(self, address: Address | None) -> None:
    """Where this rank's KV checkpoints go from here on."""
    if self._stream is not None:
      self._stream.target(address)

  def _to_mirrors(
    self, segments: list, delta: jax.Array, retired: tuple[str, ...]
  ) -> None:
    if self._mirror is not None and retired:
      self._mirror.forget(retired)
    if self._stream is not None:
      if retired:
        self._stream.forget(retired)
      if segments:
        self._stream.put(segments, delta.addressable_data(0))

  def rebase(self, request_id: str, row: int, tokens: int) -> None:
    """Streams a request's whole KV anew."""
    if self._stream is not None:
      kv = self.store.read_row(self._rank, row, tokens)
      self._stream.rebase(request_id, kv)

  def records(self, ended: Iterable[int]) -> dict[str, int]:
    """What is mirrored here, once all that `ended` had sent is read."""
    for rank in ended:
      self._server.streams_ended(rank, DRAIN_S)
    return self._mirror.records() if self._mirror is not None else {}

  def _refused(self) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Requests to rebase, steps that wait to be streamed, warnings."""
    if self._stream is None:
      return (), 0, ()
    warnings, self._warnings[:] = tuple(self._warnings), []
    refused = tuple(sorted(self._stream.take_refused()))
    return refused, self._stream.pending, warnings


def _no_peer(rank: int, expert: int) -> dict[str, Any]:
  raise LookupError(f"rank {rank} is asked for expert {expert} by `pull`")
