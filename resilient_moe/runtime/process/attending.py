"""The attention half of a worker: its steps, links, and checkpoint stream."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from resilient_moe.datapath.exchange import Exchange
from resilient_moe.datapath.parcels import Gone, Result
from resilient_moe.datapath.routes import ExpertRoutes, Routes
from resilient_moe.report.spans import Spans
from resilient_moe.runtime.process.peers import Peers
from resilient_moe.runtime.process.probe import Prober
from resilient_moe.runtime.process.stream import KVStream
from resilient_moe.runtime.process.wire import Peer, SplitSetup
from resilient_moe.runtime.split.attention import (
  AttentionRank,
  Step,
  live_lanes,
)

# A checkpoint that waits for idle links longer than a step falls behind, and
# what it is behind is computed again after a loss.
PATIENCE_S = 0.01
MISSES = 3  # probes in a row without an answer
Reached = Callable[[str, int], None]  # (place, layer): where a fault may be


class Attending:
  """Steps in the main thread; routes and ends of links in the control's."""

  def __init__(
    self, rank: int, setup: SplitSetup, authkey: bytes, device: jax.Device,
    programs: dict[str, Any], dense: dict[str, Any], reached: Reached,
    spans: Spans,
  ) -> None:  # fmt: skip
    self.rank = AttentionRank(setup.shape, device, programs, dense)
    self.rank.warm()
    self.found: list[tuple[str, dict[str, Any]]] = []  # since the last step
    self.waited_s = 0.0  # for experts, in the last step
    self._place, self._setup = rank, setup
    self._reached, self._spans = reached, spans
    self._prober = Prober(setup.probe_interval_s, setup.probes)
    self._probed: dict[int, int] = {}  # rank -> incarnation
    self._peers = Peers(rank, setup.incarnation, authkey, self._answers)
    self._lock = threading.Lock()  # of the routes
    self._routes: ExpertRoutes | None = None
    self._exchange: Exchange | None = None
    self._layer = 0
    self._step: Step | None = None  # until it is committed
    self._log = 0  # number of the step in the checkpoint's log
    self._live: np.ndarray = np.zeros(0, bool)
    self._warnings: list[str] = []
    self.stream = KVStream(
      rank, authkey, self._warnings.append, lambda: not self._busy(),
      PATIENCE_S,
    )  # fmt: skip

  def _busy(self) -> bool:
    return self._exchange is not None and self._exchange.busy

  # -- routes

  def push(self, routes: Routes, peers: dict[int, Peer]) -> None:
    """Who serves what, and where they are."""
    with self._lock:
      for rank, peer in peers.items():
        self._connect(rank, peer)
      if self._routes is None:
        self._begin(routes)
      elif not self._routes.push(routes):
        return
      self.rank.mask(routes.masked)
    self._peers.wake()

  def _begin(self, routes: Routes) -> None:
    self._routes = ExpertRoutes(routes)
    options = self._setup.exchange
    self._exchange = Exchange(
      _Watched(self._peers, self._waits), self._routes, options.healing(),
      place=self._place, dedup=options.dedup, on_event=self._on_event,
    )  # fmt: skip

  def _connect(self, rank: int, peer: Peer) -> None:
    try:
      self._peers.connect(rank, peer.desk, peer.incarnation)
    except ConnectionError as error:  # it may be dead: the next push says so
      self.found.append(("unconnected", {"rank": rank, "why": str(error)}))
    if self._probed.get(rank) != peer.incarnation:
      if rank in self._probed:
        self._prober.remove(rank)
      self._prober.add(rank, peer.desk[0], peer.probe_port)
      self._probed[rank] = peer.incarnation

  def _answers(self, rank: int) -> bool:
    return rank in self._probed and self._prober.missed(rank) < MISSES

  def forsake(self, rank: int, incarnation: int) -> None:
    """The orchestrator says that a worker is gone."""
    if self._routes is not None and self._probed.get(rank) == incarnation:
      self._routes.down(rank, incarnation)
      self._peers.disconnect(rank)
      self._peers.wake()

  def link_up(self, rank: int) -> None:
    if self._routes is not None:
      self._routes.up(rank)

  # -- steps

  def step(self, width: int, ints: np.ndarray) -> np.ndarray:
    """Tokens [1, B + 1]; the delta waits for `commit`."""
    assert self._exchange is not None, "no routes yet"
    self._step, self.waited_s = None, 0.0
    self._live = np.flatnonzero(live_lanes(self._setup.shape, width, ints))
    self._log += 1
    self._mark_s = time.monotonic()
    self._layer = 0
    self._step = self.rank.step(width, ints, self, self._on_kv)
    self._span("finish", self._mark_s, time.monotonic())
    return self._step.tokens

  def probe(self, width: int, ints: np.ndarray) -> np.ndarray:
    """Tokens of a step that is never committed nor streamed.

    It may come between another step and the commit of that.
    """
    assert self._exchange is not None, "no routes yet"
    self._mark_s = time.monotonic()
    return self.rank.step(width, ints, self).tokens

  def run(
    self, layer: int, h: np.ndarray, experts: np.ndarray, live: np.ndarray
  ) -> np.ndarray:
    """The exchange of a layer, timed (`Exchange.run`)."""
    assert self._exchange is not None
    self._layer = layer
    start = time.monotonic()
    self._span("attention", self._mark_s, start)
    self._reached("attention", layer)
    y = self._exchange.run(layer, h, experts, live)
    self._mark_s = time.monotonic()
    self.stream.wake()  # the links are idle
    self.waited_s += self._mark_s - start
    self._span("exchange", start, self._mark_s)
    return y

  def _waits(self) -> None:
    self._reached("exchange", self._layer)

  def _span(self, name: str, start_s: float, end_s: float) -> None:
    self._spans.add(name, start_s, end_s, layer=self._layer)

  def _on_event(self, name: str, **facts: Any) -> None:
    self.found.append((name, facts))
    for rank in list(self._probed):
      if not self._answers(rank):
        self.found.append(("silent", {"rank": rank}))

  def _on_kv(self, first: int, kv: jax.Array) -> None:
    """A layer's new KV goes to the log while the step goes on."""
    if self.stream.alive:
      lanes = self._live.tolist()
      for i, data in enumerate(np.asarray(kv)):
        self.stream.log(self._log, first + i, data, lanes)

  def commit(self, segments: list, retired: tuple[str, ...]) -> None:
    """The step counts: into the cache, and a commit record behind its log."""
    step, self._step = self._step, None
    assert step is not None
    self.rank.commit(step)
    if retired:
      self.stream.forget(retired)
    if segments:
      self.stream.commit(self._log, segments)

  # -- checkpoints

  def rebase(self, request_id: str, row: int, tokens: int) -> None:
    self.stream.rebase(request_id, self.rank.read_row(row, tokens))

  def refused(self) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Requests to rebase, steps that wait to be streamed, warnings."""
    warnings, self._warnings[:] = tuple(self._warnings), []
    refused = tuple(sorted(self.stream.take_refused()))
    return refused, self.stream.pending, warnings

  def settled(self) -> int:
    """Waits for commits; KV bytes streamed so far."""
    self.rank.wait()
    return self.stream.bytes_sent

  def traffic(self) -> tuple[int, int]:
    """Bytes of embeddings sent to expert workers, and got back."""
    if self._exchange is None:
      return 0, 0
    return self._exchange.sent_bytes, self._exchange.returned_bytes

  def close(self) -> None:
    """Ends links, probes and the stream; drops the arrays."""
    self._peers.close()
    self._prober.close()
    self.stream.close()
    self.rank.delete()


class _Watched:
  """Links that say when the exchange waits (`parcels.Transport`)."""

  def __init__(self, peers: Peers, waits: Callable[[], None]) -> None:
    self.send = peers.send
    self.send_urgent = peers.send_urgent
    self.answers = peers.answers
    self._receive, self._waits = peers.receive, waits

  def receive(self, wait_s: float) -> list[Result | Gone]:
    self._waits()
    return self._receive(wait_s)
