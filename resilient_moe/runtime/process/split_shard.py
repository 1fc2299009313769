"""What a worker holds that attends, or holds experts, but not both.

The main thread does calls (steps, weights, KV); the desk's thread computes
parcels; the control thread learns who serves what and who is gone, also while
a step waits. No collective: nobody's programs know of another worker.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from resilient_moe.datapath.exchange import ExchangeCancelled
from resilient_moe.datapath.routes import ExpertsUnreachable, Routes
from resilient_moe.mesh.executables import Executables
from resilient_moe.model.step import request_kv_shape
from resilient_moe.recovery import Role
from resilient_moe.report.spans import Spans
from resilient_moe.runtime.process.attending import Attending
from resilient_moe.runtime.process.compiles import Compiles
from resilient_moe.runtime.process.data import (
  DRAIN_S,
  DataClient,
  DataServer,
  PullFailed,
)
from resilient_moe.runtime.process.holding import Holding
from resilient_moe.runtime.process.mirror import KVMirror
from resilient_moe.runtime.process.peers import ComputeFailed
from resilient_moe.runtime.process.probe import Responder
from resilient_moe.runtime.process.wire import (
  Address,
  Found,
  Member,
  Peer,
  SplitSetup,
  Up,
)
from resilient_moe.runtime.readiness import COMPILED_POLL_S
from resilient_moe.runtime.split.families import FAMILIES, programs_of
from resilient_moe.runtime.stages import Stages
from resilient_moe.runtime.weights import WeightTiers, tree_bytes

GAVE_UP = (ExpertsUnreachable, ExchangeCancelled, ComputeFailed)


class SplitShard:
  """One attention or expert worker; its role can be switched."""

  say: Callable[[Found], None]

  def __init__(
    self, rank: int, setup: SplitSetup, authkey: bytes, host: str
  ) -> None:
    """`host`: the address under which others reach this process."""
    self._rank, self._setup, self._authkey = rank, setup, authkey
    self._strike: tuple[str, int] | None = None  # where to die
    self._attending: Attending | None = None
    self._clients: dict[Address, DataClient] = {}
    seconds: dict[str, float] = {}
    stages = Stages(seconds.__setitem__)
    jax.config.update("jax_enable_compilation_cache", False)
    self._compiles = Compiles()
    self._device = jax.local_devices()[0]
    stages.done("devices")
    self.weights = WeightTiers(
      setup.checkpoint, setup.shape.config.dtype, setup.host_weights
    )
    stages.done("weights")
    self._executables = Executables(setup.shape, setup.store)
    while not all(map(self._executables.has_programs, FAMILIES)):
      time.sleep(COMPILED_POLL_S)  # one process compiles them for everybody
    stages.done("executables")
    self.spans = self._open_spans()
    self._holding = Holding(
      rank, setup, authkey, host, self.weights, self._reached, self.spans
    )
    self._mirror = None
    if setup.mirrors:
      kv = request_kv_shape(setup.shape.config, setup.shape.options)
      self._mirror = KVMirror(kv, setup.shape.config.dtype)
    self._server = DataServer(
      host, authkey, self._mirror,
      {"slot": self._holding.read_slot, "row": self._read_row},
    )  # fmt: skip
    self._take_role(setup.role, setup.slots)
    stages.done("placing")
    responder = Responder.start(host, setup.probes)
    self.weights.filled()
    self.up = Up(
      self._server.address, responder.port, responder.native,
      tree_bytes(self.weights.dense), self.weights.host_bytes, seconds,
      self._holding.desk.address,
    )  # fmt: skip

  def _open_spans(self) -> Spans:
    setup = self._setup
    role = setup.role.name.lower()
    return Spans(setup.spans, self._rank, role, setup.start_s)

  # -- roles

  def _take_role(self, role: Role, slots: tuple[int, ...]) -> None:
    """Makes and warms the arrays of a role; what the other holds is kept."""
    device = self._device
    programs = programs_of(self._executables, role, device)
    if role == Role.EXPERT:
      self._holding.hold(self._setup, device, programs, slots)
    else:
      self._attending = Attending(
        self._rank, self._setup, self._authkey, device, programs,
        self.weights.dense, self._reached, self.spans,
      )  # fmt: skip

  def switch(self, role: int, slots: tuple[int, ...]) -> None:
    """The rank gets what its new role needs."""
    if Role(role) == Role.ATTENTION:
      self._holding.drop()
    self._take_role(Role(role), slots)

  def stop_attending(self) -> None:
    """The requests have moved: their KV and the dense weights are dropped."""
    if self._attending is not None:
      self._attending.close()
      self._attending = None

  def _attend(self) -> Attending:
    if self._attending is None:
      raise LookupError(f"rank {self._rank} doesn't attend")
    return self._attending

  # -- steps of an attention worker

  def members(self, incarnations: dict[int, int]) -> None:
    """Which process is which rank comes with the routes."""

  def routes(self, routes: Routes, peers: dict[int, Peer]) -> None:
    """Who serves what from now on (also on the control connection)."""
    if self._attending is not None:
      self._attending.push(routes, peers)

  def step(self, width: int, ints: np.ndarray) -> tuple:
    """One step: tokens [1, B + 1] (None: given up), own and all seconds.

    Behind them what the exchange found out, and what is to be said of the
    stream.
    """
    attending = self._attend()
    start = time.monotonic()
    try:
      tokens = attending.step(width, ints)
    except GAVE_UP as error:
      tokens = None
      attending.found.append(("given_up", {"reason": str(error)}))
    end = time.monotonic()
    found, attending.found = attending.found, []
    own_s = end - start - attending.waited_s
    return tokens, own_s, end - start, found, *attending.refused()

  def probe(self, width: int, ints: np.ndarray) -> np.ndarray:
    """Tokens [1, B + 1] of a step that changes nothing."""
    return self._attend().probe(width, ints)

  def commit(self, segments: list, retired: tuple[str, ...]) -> None:
    """The step counts: into the cache, and the commit record to the store."""
    if self._mirror is not None and retired:
      self._mirror.forget(retired)
    self._attend().commit(segments, retired)

  def stream_to(self, address: Address | None) -> None:
    """Where this rank's KV checkpoints go from here on."""
    if self._attending is not None:
      self._attending.stream.target(address)

  def rebase(self, request_id: str, row: int, tokens: int) -> None:
    """Streams a request's whole KV anew."""
    if self._attending is not None:
      self._attending.rebase(request_id, row, tokens)

  def records(self, ended: Iterable[int]) -> dict[str, int]:
    """What is mirrored here, once all that `ended` had sent is read."""
    for rank in ended:
      self._server.streams_ended(rank, DRAIN_S)
    return self._mirror.records() if self._mirror is not None else {}

  def rows(
    self, rows: list[dict[str, Any]]
  ) -> list[tuple[str, int, int, str]]:
    """KV of requests into rows: (request, positions, bytes, why not)."""
    said = []
    self._forget_others({fields["address"] for fields in rows})
    for fields in rows:
      name = fields.pop("request_id")
      try:
        said.append((name, *self._row(**fields), ""))
      except (OSError, PullFailed) as error:
        said.append((name, 0, 0, str(error)))
    return said

  def _row(
    self, row: int, what: str, address: Address, args: tuple
  ) -> tuple[int, int]:
    if address == self._server.address and what == "kv":
      assert self._mirror is not None
      kv = self._mirror.get(*args)
    else:
      [kv] = self._client(address).pull(what, *args)
    if kv is None:
      return 0, 0
    self._attend().rank.write_row(row, kv)
    self._attend().rank.wait()
    return kv.shape[2], kv.nbytes

  def _read_row(self, row: int, tokens: int) -> list[np.ndarray]:
    return [self._attend().rank.read_row(row, tokens)]

  # -- an expert worker's slots

  def fill(self, fills: list[dict[str, Any]]) -> int:
    """Experts' weights into slots; bytes."""
    self._forget_others({f["source"][0] for f in fills if f["source"]})
    return sum(
      self._holding.fill(**fill, client=self._client) for fill in fills
    )

  def _forget_others(self, addresses: set[Address]) -> None:
    """Ends the other links: some are to processes that are gone."""
    for address in set(self._clients) - addresses:
      self._clients.pop(address).close()

  def _client(self, address: Address) -> DataClient:
    if address not in self._clients:
      self._clients[address] = DataClient(address, self._authkey)
    return self._clients[address]

  def done(self) -> int:
    """All calls before this one are done; KV bytes streamed so far."""
    return self._attending.settled() if self._attending is not None else 0

  def compiled(self) -> int:
    """Programs that this process has compiled; nobody should."""
    return self._compiles.count

  def traffic(self) -> tuple[int, int]:
    """Bytes of embeddings sent to expert workers, and got back.

    Asked at the end: what is left of the spans is written, too.
    """
    self.spans.flush()
    if self._attending is None:
      return 0, 0
    return self._attending.traffic()

  # -- who is gone (control thread)

  def abort(self, gone: tuple[Member, ...]) -> None:
    """Nobody waits for these any more, nor takes anything from them."""
    for rank, incarnation in gone:
      self._holding.desk.fence(rank, incarnation)
      if self._attending is not None:
        self._attending.forsake(rank, incarnation)

  def shut(self) -> None:
    """No collective to end."""

  # -- faults (control thread)

  def strike_at(self, place: str, layer: int) -> None:
    """A fault: the process kills itself when it gets there."""
    self._strike = place, layer

  def link(self, rank: int, cut: bool, delay_s: float) -> None:
    """A fault, or its end: what is wrong with the link to an AW."""
    self._holding.link(rank, cut, delay_s)

  def link_up(self, rank: int) -> None:
    """The link to an expert worker works again."""
    if self._attending is not None:
      self._attending.link_up(rank)

  def _reached(self, place: str, layer: int) -> None:
    if self._strike == (place, layer):
      self.say(Found("struck", {"at_s": time.monotonic()}))
      os.kill(os.getpid(), signal.SIGKILL)

