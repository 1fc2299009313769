"""The process runtime with attention and experts in different processes.

The orchestrator: one scheduler, a step under way in every attention worker,
routing tables pushed to them. Workers talk to each other point to point, so a
death is confined to who needs the dead one, and attention workers heal the
loss of an expert worker before they hear of it from here.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from resilient_moe.faults import LINK_KINDS, Fault
from resilient_moe.mesh.executables import Source
from resilient_moe.recovery import LinkLost, Role, Straggler
from resilient_moe.recovery.actions import Action, CopyExperts, Rejoin
from resilient_moe.recovery.checks import expert_ranks, request_ranks
from resilient_moe.recovery.reserve import Memory
from resilient_moe.runtime.execute import Mesh
from resilient_moe.runtime.instance import packed
from resilient_moe.runtime.process.backend import ProcessBackend
from resilient_moe.runtime.process.doubts import Doubts
from resilient_moe.runtime.process.wire import Found, Peer, Reply
from resilient_moe.runtime.split.tables import routes_of
from resilient_moe.serving.backend import Outcome, Placed, Stepped
from resilient_moe.serving.scheduler import StepBatch

LATE_S = 2.0  # for a fault inside a step to find its place


class SplitProcess(ProcessBackend):
  """Every attention worker steps by itself (`serving.backend.Backend`)."""

  def __init__(self, *parts: Any) -> None:
    self._version = 0  # of the routes that were pushed last
    self._running: dict[int, tuple[StepBatch, float]] = {}
    self._inside: dict[int, tuple[Fault, float]] = {}  # rank -> since
    self._mended: list[tuple[float, Fault]] = []  # links, when
    self._meanwhile: Callable[[], None] = _nothing
    super().__init__(*parts)
    self._doubts = Doubts(self.crew)
    self._routed: set[int] = set()  # who attends and has routes
    self._own_s: dict[int, float] = {}  # of each one's last step

  def domains(self) -> tuple[Mesh, ...]:
    return tuple((int(r),) for r in request_ranks(self.facts.view))

  def begin_serving(self) -> None:
    """Everybody who attends knows who serves what, and has said so."""
    self._version += 1
    told = self._news()
    self.crew.call({r: told for (r,) in self.domains()}, "routes").good()
    self._routed = set(self._attending())
    self.kv.ring(self._attending())

  # -- steps

  def call_meanwhile(self, meanwhile: Callable[[], None]) -> None:
    self._meanwhile = meanwhile

  def execute(self, action: Action, placed: tuple[Placed, ...]) -> Outcome:
    """An action may take a while: who isn't concerned goes on stepping."""
    self.crew.meanwhile = self._meanwhile
    try:
      return super().execute(action, placed)
    finally:
      self.crew.meanwhile = _nothing

  def begin(self, batch: StepBatch) -> None:
    (rank,) = batch.mesh
    self.kv.seats(batch)
    self._arm(self.due_in_step(batch, self._settled()), self._step_s)
    self._running[rank] = batch, time.monotonic()
    self.crew.ask(rank, {"width": batch.width, "ints": packed(batch)}, "step")

  def finished(self, wait_s: float) -> list[Stepped]:
    ended = []
    for rank, reply in self.crew.answered(wait_s):
      batch, began_s = self._running.pop(rank)
      tokens = None
      if reply is not None and rank in self._attending():
        tokens = self._counts(rank, batch, reply, time.monotonic() - began_s)
      ended.append(Stepped(batch, tokens))
    return ended

  def _counts(
    self, rank: int, batch: StepBatch, reply: Reply, seconds: float
  ) -> np.ndarray | None:
    """Commits a step that its worker could finish."""
    if reply.error:
      self.record("warning", text=f"step of rank {rank}: {reply.error}")
      return None
    tokens, own_s, all_s, found, *stream = reply.value
    for name, facts in found:
      self._take_found(rank, Found(name, facts))
    self.kv.heard(rank, *stream)
    if tokens is None:
      return None
    segments = self.kv.segments(batch).get(rank, [])
    self.crew.tell(
      {rank: {"segments": segments, "retired": batch.retired}}, "commit"
    )
    self.kv.committed(batch)
    self._step_s = seconds
    self.parts = {**self.parts, rank: (own_s, all_s - own_s)}
    self._watch_own(rank, seconds, own_s)
    return np.asarray(tokens)

  def _watch_own(self, rank: int, seconds: float, own_s: float) -> None:
    """Who is slow is found once everybody who attends has stepped."""
    self.crew.watch.clock.finished(seconds)
    self._own_s[rank] = own_s
    if not self._own_s.keys() >= set(self._attending()):
      return
    self.crew.watch.slow.add(self._own_s)
    self._own_s = {}
    for slow, slowdown in self.crew.watch.slow.reports():
      self.pending.append(Straggler(slow, slowdown))

  def probe(self, ints: np.ndarray) -> np.ndarray:
    """A wide step of each attention rank, without a commit."""
    width = self.shape.options.chunk
    calls = {
      rank: {"width": width, "ints": ints[i : i + 1]}
      for i, rank in enumerate(self._attending())
    }
    said = self._pulled(calls, "probe")
    return np.concatenate([said[rank] for rank in calls])

  # -- failures

  def _take_lost(self) -> None:
    super()._take_lost()
    for rank, found in self.crew.found():
      self._take_found(rank, found)
    self._doubts.judge()

  def _take_found(self, rank: int, found: Found) -> None:
    """What a worker has found out, or is about to do."""
    facts = found.facts
    if found.name == "struck" and rank in self._inside:
      fault, _ = self._inside.pop(rank)
      self.struck(fault)
      for other in fault.ranks:
        if other != rank:
          self._signals.kill(other)
    elif found.name == "healed":
      self.record(
        "healed", by=rank, rank=facts["rank"], layer=facts["layer"],
        experts=facts["experts"], seconds=facts["seconds"],
      )  # fmt: skip
    elif found.name == "silent":
      self._doubts.add(rank, facts["rank"])
    elif found.name == "link_bad":
      self._suspect(LinkLost(rank, facts["rank"], facts["elsewhere"]))
    elif found.name in ("given_up", "unconnected"):
      text = ", ".join(f"{key} {value}" for key, value in facts.items())
      self.record("warning", text=f"rank {rank}: {found.name}: {text}")

  def _suspect(self, failure: LinkLost) -> None:
    """An attention worker gets nothing from an expert worker that lives."""
    if failure not in self.pending and self.crew.alive(failure.expert):
      self.pending.append(failure)

  def _in_peace(self) -> None:
    self.kv.rebase_one()
    now = time.monotonic()
    for at, fault in list(self._mended):
      if at <= now:
        self._mended.remove((at, fault))
        self._link(fault, cut=False, delay_s=0.0)
        self.crew.inform({fault.ranks[0]: {"rank": fault.ranks[1]}}, "link_up")
    for rank, (fault, since) in list(self._inside.items()):
      if now - since > LATE_S:  # it never gets there: it is idle
        del self._inside[rank]
        self._signals.arm(fault, 0.0)

  # -- faults

  def _arm(self, faults: list[Fault], within_s: float) -> None:
    whole = []
    for fault in faults:
      if fault.kind in LINK_KINDS:
        self.struck(fault)
        cut = fault.kind == "link_cut"
        self._link(fault, cut, float(fault.delay_s or 0.0))
        if fault.resume_s is not None:
          self._mended.append((time.monotonic() + fault.resume_s, fault))
      elif fault.inside is not None and fault.kind == "rank_lost":
        self._strike_inside(fault)
      else:
        whole.append(fault)
    super()._arm(whole, within_s)

  def _strike_inside(self, fault: Fault) -> None:
    """The first victim kills itself where the fault says."""
    self._remember(self.injector)
    self._awaited.update(r for r in fault.ranks if self.crew.alive(r))
    rank = fault.ranks[0]
    self._inside[rank] = fault, time.monotonic()
    layer = self._signals.draw(self.shape.config.moe_layers)
    self.crew.inform(
      {rank: {"place": fault.inside, "layer": layer}}, "strike_at"
    )

  def _link(self, fault: Fault, cut: bool, delay_s: float) -> None:
    attention, expert = fault.ranks
    call = {"rank": attention, "cut": cut, "delay_s": delay_s}
    self.crew.inform({expert: call}, "link")

  def struck(self, fault: Fault) -> None:
    """Told right before a fault happens; an expert rank serves everybody."""
    attending = set(self._attending())
    hit = [r for r in fault.ranks if r in attending]
    if fault.kind not in LINK_KINDS and len(hit) < len(fault.ranks):
      hit = list(attending)
    self.record_fault(fault, self.kv.sitting_on(hit))

  # -- actions

  def changed(self) -> None:
    """New tables for everybody who attends; KV of who doesn't any more."""
    view = self.facts.view
    self._version += 1
    told = self._news()
    attending = self._attending()
    self.crew.inform(dict.fromkeys(attending, told), "routes")
    # A new one's first step must not come before them, on its other connection.
    new = set(attending) - self._routed
    self.crew.tell(dict.fromkeys(new, told), "routes")
    self._routed = set(attending)
    self.kv.ring(attending)
    switched = (view.home == Role.ATTENTION) & (view.role == Role.EXPERT)
    for rank in np.flatnonzero(switched & view.alive()).tolist():
      if not self.kv.sitting_on([rank]):
        self.crew.tell({rank: {}}, "stop_attending")

  def _attending(self) -> tuple[int, ...]:
    return tuple(rank for (rank,) in self.domains())

  def _news(self) -> dict[str, Any]:
    """Who serves what, and where they are."""
    peers = {}
    for rank in expert_ranks(self.facts.view).tolist():
      mate = self.crew.mate(rank) if self.crew.alive(rank) else None
      if mate is not None and mate.up is not None and mate.up.desk is not None:
        peers[rank] = Peer(
          mate.up.desk, mate.incarnation, mate.up.probe_port
        )
    known = {rank: peer.incarnation for rank, peer in peers.items()}
    routes = routes_of(self.facts.view, self._version, known)
    return {"routes": routes, "peers": peers}

  def load(self, mesh: Mesh, run: bool) -> Source:
    del mesh, run
    return Source.WARM  # programs belong to workers

  def run_once(self, mesh: Mesh, width: int) -> None:
    raise AssertionError(f"no program of width {width} belongs to mesh {mesh}")

  def switch(self, rank: int, role: Role) -> None:
    empty = (-1,) * self.facts.view.slots_per_rank
    call = {"role": int(role), "slots": empty}
    self.crew.call({rank: call}, "switch").good()

  def joined(self, rank: int) -> None:
    pass  # `changed` tells it who serves, and the others that it does

  def ready_for(self, action: Action) -> bool:
    if isinstance(action, CopyExperts):
      return all(self._is_up(m.rank) for m in action.moves)
    return not isinstance(action, Rejoin) or self._is_up(action.rank)

  def close(self) -> None:
    """Ends every process; what went over the links is recorded."""
    try:
      calls: dict[int, dict] = {r: {} for r in self.crew.up_ranks()}
      said = self.crew.call(calls, "traffic").values.values()
      sent, back = np.array([(0, 0), *said]).sum(axis=0).tolist()
      self.record("exchange", sent_bytes=sent, returned_bytes=back)
    finally:
      super().close()

  def memory(self) -> Memory:
    """KV is copied of those who attend only."""
    memory = super().memory()
    attend = len(self._attending()) / max(memory.present, 1)
    copied = round(memory.checkpoint_bytes * attend)
    return memory._replace(checkpoint_bytes=copied)

  def held_open(self) -> dict[str, int]:
    """Links between attention and expert workers."""
    experts = len(expert_ranks(self.facts.view))
    return {"connections": len(self._attending()) * experts}


def _nothing() -> None:
  pass
