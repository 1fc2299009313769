"""Runs whole cases in the test's own process, on its virtual devices.

What `runtime.engine` and `runtime.gateway` do with a process and a socket,
done with a list: plans, `assemble`, `serve`, a fresh engine after a restart,
the client's retries. Programs compiled by one test serve the next (`Lab`);
tests of what is compiled when bring a store of their own.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.monitoring
import numpy as np

from resilient_moe import recovery as rm
from resilient_moe.faults import Schedule
from resilient_moe.mesh.executables import Executables, step_name
from resilient_moe.model.checkpoint import save_checkpoint
from resilient_moe.model.config import ModelConfig
from resilient_moe.model.params import init_params
from resilient_moe.report import verdict
from resilient_moe.runtime import assemble, engine
from resilient_moe.runtime.case import Case, make_policy
from resilient_moe.runtime.channel import Channel, ChannelRecorder
from resilient_moe.runtime.emulated import EmulatedBackend
from resilient_moe.runtime.split import start as split_start
from resilient_moe.serving import recover
from resilient_moe.serving.carry import EngineRestart
from resilient_moe.serving.request import Request
from resilient_moe.serving.state import Current, SchedulerState
from tests.runtime.drive import Driver
from tests.runtime.intake import ListIntake
from tests.runtime.split.families import link_families
from tests.runtime.watch import world

RANKS = 4
MODEL = ModelConfig(
  vocab_size=64, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16,
  n_experts=8, top_k=2, expert_width=32,
)  # fmt: skip
OPTIONS = {"rows": 2, "max_len": 96, "chunk": 16, "kv_block": 16}

Event = dict[str, Any]
OnBackend = Callable[[EmulatedBackend], None]
COMPILED: list[str] = []  # grows by one with each compilation in this process


def _count(event: str, duration_secs: float, **unused: str | int) -> None:
  del duration_secs, unused
  if event.endswith("backend_compile_duration"):
    COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_count)


@dataclasses.dataclass
class Lab:
  """A checkpoint, and a folder where compiled programs are shared."""

  root: pathlib.Path
  checkpoint: pathlib.Path

  def store(self, plans: assemble.Plans) -> pathlib.Path:
    """A scratch folder that holds every program a case begins with."""
    about = plans.shape, plans.view.disaggregated
    name = hashlib.sha1(repr(about).encode()).hexdigest()[:12]
    scratch = self.root / "store" / name
    folder = scratch / "executables"
    if not folder.is_dir():
      folder.mkdir(parents=True)
      for generation in range(1, 5):  # a cold engine's own store
        (scratch / f"cold{generation}").symlink_to(folder)
    executables = Executables(plans.shape, folder)
    if plans.view.disaggregated:  # no program belongs to a mesh
      link_families(self.root, plans.shape, folder)
      return scratch
    n = len(plans.view.launched)
    sizes = {len(plans.view.mesh)} | {
      n - sum(1 if r >= 0 else -1 for r in name)
      for name in plans.standing.ready
    }
    for size in sorted(sizes):
      for chunk in plans.shape.chunks():
        executables.compile_for(chunk, jax.devices()[:size])
    return scratch

  def store_of_full_mesh(
    self, plans: assemble.Plans, scratch: pathlib.Path
  ) -> pathlib.Path:
    """A new scratch folder with programs of the first mesh, no other."""
    names = [f"commit{c}" for c in plans.shape.chunks()] + ["write_slot"]
    names += [
      step_name(c, len(plans.view.mesh)) for c in plans.shape.chunks()
    ]
    (scratch / "executables").mkdir(parents=True)
    whole = self.store(plans) / "executables"
    for name in names:
      if (whole / name).is_file():
        shutil.copy(whole / name, scratch / "executables" / name)
    return scratch

  @functools.cached_property
  def twin(self) -> list[Event]:
    """The events of the fault-free run."""
    return Host(self, make_case(self, "none")).run()

  def verdict(self, events: list[Event]) -> dict[str, Any]:
    """What the checkers say about a run beside its fault-free twin."""
    # The seed draws faults, and the twin has none.
    run, *rest = self.twin
    return verdict(events, [{**run, "seed": events[0]["seed"]}, *rest])


def make_lab(root: pathlib.Path) -> Lab:
  """Writes the checkpoint of a tiny random model."""
  checkpoint = root / "checkpoint"
  params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
  save_checkpoint(checkpoint, MODEL, params)
  return Lab(root, checkpoint)


def make_requests(n: int = 10, new_tokens: int = 24) -> tuple[Request, ...]:
  """Greedy and sampled requests; most at once, others while those decode."""
  rng = np.random.default_rng(7)
  return tuple(
    Request(
      request_id=f"r{i}",
      prompt=tuple(rng.integers(0, MODEL.vocab_size, 5 + 4 * i).tolist()),
      max_new_tokens=new_tokens + i % 3,
      seed=i,
      temperature=0.8 * (i > 3),
      arrival_step=0 if i < n - 4 else 6 * (i - n + 5),
    )
    for i in range(n)
  )


def make_case(
  lab: Lab, policy: str, faults: Schedule = (), **fields: Any
) -> Case:
  """A small case; `fields` replace its defaults."""
  given: dict[str, Any] = {
    "checkpoint": str(lab.checkpoint), "policy": policy, "policy_kwargs": {},
    "scenario": "test", "seed": 0, "runtime": "emulated",
    "deployment": "collocated", "ranks": RANKS, "options": OPTIONS,
    "requests": make_requests(), "faults": faults,
  }  # fmt: skip
  return Case(**{**given, **fields})


class _Control:
  """Takes what an engine would tell its gateway."""

  def __init__(self) -> None:
    self.fresh: dict[str, Any] = {}

  def send(self, message: dict[str, Any]) -> None:
    self.fresh = message["fresh"]


class Host:
  """The gateway's and the engine's part of one run."""

  def __init__(
    self, lab: Lab, case: Case, *, on_backend: OnBackend | None = None,
    scratch: pathlib.Path | None = None,
  ) -> None:  # fmt: skip
    """`on_backend` sees each engine's backend before it serves."""
    self.events: list[Event] = []
    self.case = case
    self.intake = ListIntake(self._accepted)
    self.backends: list[EmulatedBackend] = []  # one an engine
    self.compiled: int | None = None  # programs since the first fault
    self._at_fault: int | None = None
    self._lab, self._scratch = lab, scratch
    self._on_backend = on_backend or (lambda backend: None)
    self.recorder = ChannelRecorder(self._hear, time.monotonic())

  def run(self) -> list[Event]:
    """Serves the case to its end; the events, also left in `events`."""
    policy = make_policy(self.case)
    self.recorder.write(
      "run", policy=self.case.policy, scenario=self.case.scenario,
      runtime="emulated", deployment=self.case.deployment,
      seed=self.case.seed, ranks=self.case.ranks,
      lossless=policy.lossless, exact=True,
      fails_requests=policy.fails_requests,
      expected_faults=len(self.case.faults),
    )  # fmt: skip
    for request in self.case.requests:
      self.intake.accept(request)
    fresh: assemble.Fresh | None = assemble.Fresh()
    while fresh is not None:
      fresh = self._engine(fresh)
      self.intake.given.clear()
    self.recorder.write("end")
    if self._at_fault is not None:
      self.compiled = len(COMPILED) - self._at_fault
    return self.events

  def start(
    self, fresh: assemble.Fresh | None = None
  ) -> tuple[assemble.Plans, EmulatedBackend]:
    """An engine's backend; the caller closes it."""
    fresh = fresh or assemble.Fresh()
    plans = assemble.plan_instance(self.case, fresh)
    n = self.case.ranks + plans.policy.spares
    apart = self.case.deployment == "disaggregated"
    put_together = (split_start if apart else assemble).assemble
    backend = put_together(
      self.case, plans, fresh, jax.devices()[:n],
      self._scratch or self._lab.store(plans), self.recorder,
    )  # fmt: skip
    self.backends.append(backend)
    self._on_backend(backend)
    return plans, backend

  def _engine(self, fresh: assemble.Fresh) -> assemble.Fresh | None:
    """One engine's life; what the next one takes over, if it is restarted."""
    plans, backend = self.start(fresh)
    control = _Control()
    try:
      engine._prepare(self.case, plans, fresh, backend, self.recorder)
      engine._run(
        cast(Channel, control), cast(Any, self.intake), plans, fresh, backend,
        self.recorder,
      )  # fmt: skip
    except EngineRestart:
      return assemble.Fresh(**engine._tuples(control.fresh))
    finally:
      backend.close()
    return None

  def _accepted(self, request: Request) -> None:
    self.recorder.write(
      "accepted", request_id=request.request_id,
      prompt_tokens=list(request.prompt), retry_of=request.retry_of,
      max_new_tokens=request.max_new_tokens,
    )  # fmt: skip

  def _hear(self, line: str) -> None:
    event = json.loads(line)
    self.events.append(event)
    if event["event"] == "step":
      for name, _, token in event["emitted"]:
        self.intake.tokens[name].append(token)
    elif event["event"] in ("finished", "failed"):
      self.intake.ended.add(event["request_id"])
    if event["event"] == "fault" and self._at_fault is None:
      self._at_fault = len(COMPILED)
    if event["event"] == "failed":
      self.intake.failed.append(event["request_id"])


def nobody(event: str, t: float | None = None, **fields: object) -> None:
  """A record that keeps nothing."""


def on(state: SchedulerState, rank: int) -> list[str]:
  return [n for n, s in state.sequences.items() if s.rank == rank]


class Plan:
  """Carries actions out one by one, chosen by what is there.

  `settle`, `copy` and `bring_back` are for runtimes where more is to see.
  """

  def __init__(self, driver: Driver) -> None:
    self.driver = driver

  @property
  def view(self) -> rm.ClusterView:
    return world(self.driver.backend, self.driver.state)

  def do(self, *actions: rm.Action) -> list[str]:
    outcomes = []
    for action in actions:
      current = Current(self.driver.state)
      outcome = recover.carry_out(
        action, current, self.driver.backend, nobody
      )
      self.driver.state = current.state
      outcomes.append(outcome.detail)
    return outcomes

  def copy(self, tier: rm.Tier, expert: int, rank: int) -> None:
    """An expert into a rank's first free slot."""
    slot = int((self.view.slots[rank] < 0).argmax())
    source = int((self.view.slots == expert).any(axis=1).argmax())
    self.do(rm.CopyExperts((rm.Move(expert, rank, slot, source),), tier))

  def serve_all(self) -> None:
    """Everything that is held serves, up to the table's width."""
    self.do(rm.RemapExperts(rm.retable(self.view)))

  def settle(self) -> None:
    """Lets what goes on behind the steps come to rest."""

  def bring_back(self, rank: int) -> None:
    """Replaces a rank that was fenced."""
    self.do(rm.LaunchRank(rank), rm.Rejoin(rank))

  def every_action(self) -> str:
    """All that a collocated engine does itself; the request that it failed."""
    driver = self.driver
    driver.accept(make_requests(n=8))
    driver.step(10)
    self.settle()
    self.copy(rm.Tier.PEER, 0, 2)
    self.copy(rm.Tier.HOST, 1, 3)
    self.copy(rm.Tier.DISK, 2, 0)
    self.do(rm.MaskExperts((5, 6)))
    self.serve_all()
    driver.step(2)
    self.settle()
    self.do(rm.RebuildMesh((0, 1, 2)))
    fetch = rm.FetchExecutable(frozenset({3}))
    assert self.do(fetch, fetch) == ["stored", "warm"]
    self._move_away(on(driver.state, 3))
    self.do(rm.Fence((3,)))
    driver.step(2)
    self.settle()
    self.bring_back(3)
    self.do(rm.Verify())
    queued, ended = on(driver.state, 0)[0], on(driver.state, 2)[0]
    self.settle()
    self.do(rm.RestoreKV((on(driver.state, 1)[0],), (3,), rm.Tier.HOST))
    self.do(rm.Requeue((queued,)), rm.FailRequests((ended,)))
    return ended

  def _move_away(self, away: list[str]) -> None:
    """What a rank leaves behind goes to the others: requests and experts."""
    restored, computed = away
    self.do(rm.RestoreKV((restored,), (0,), rm.Tier.PEER))
    assert self.driver.state.sequences[restored].computed > 10
    self.do(rm.RecomputePrefix((computed,), (1,)))
    self.cover()

  def cover(self) -> None:
    """Experts that nobody holds any more are read again, and served."""
    moves = rm.assign(self.view, rm.lost_experts(self.view))
    assert not isinstance(moves, str)
    self.do(*rm.copies_from(self.view, moves))
    self.serve_all()

  def finish(self, lab: Lab, ended: str) -> None:
    """Serves to the end: all but `ended` said what they always say."""
    while self.driver.step():
      self.driver.backend.poll()
    for name, tokens in self.driver.tokens.items():
      assert name == ended or tokens == expected(lab, name), name


def expected(lab: Lab, name: str) -> list[int]:
  """What a request says without faults."""
  return [
    token
    for event in lab.twin if event["event"] == "step"
    for request, _, token in event["emitted"] if request == name
  ]  # fmt: skip
