"""Starts an engine of processes: the service, the workers, the store."""

import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from resilient_moe.faults import Fault, Injector
from resilient_moe.mesh.executables import Executables
from resilient_moe.model.step import request_kv_shape
from resilient_moe.recovery import mesh_named
from resilient_moe.report import Recorder
from resilient_moe.report.runs import write_text
from resilient_moe.runtime.assemble import (
  Fresh,
  Plans,
  make_injector,
  stages_of,
  store_folder,
)
from resilient_moe.runtime.case import Case
from resilient_moe.runtime.execute import canary
from resilient_moe.runtime.journal import INJECTOR
from resilient_moe.runtime.process import private
from resilient_moe.runtime.process.backend import ProcessBackend
from resilient_moe.runtime.process.cluster import Cluster
from resilient_moe.runtime.process.crew import START_S, Crew
from resilient_moe.runtime.process.kv_copies import KVCopies
from resilient_moe.runtime.process.mate import WorkerFailed
from resilient_moe.runtime.process.rules import Limits
from resilient_moe.runtime.process.signals import Signals
from resilient_moe.runtime.process.stores import Stores
from resilient_moe.runtime.process.watch import Watch
from resilient_moe.runtime.process.wire import Setup, SplitSetup
from resilient_moe.runtime.readiness import Readiness
from resilient_moe.runtime.stages import Stages

INCARNATIONS = 32  # processes that one rank can be, one after the other


def assemble(
  case: Case, plans: Plans, fresh: Fresh, scratch: pathlib.Path,
  recorder: Recorder,
) -> ProcessBackend:  # fmt: skip
  """An engine of processes, ready to serve; each stage is recorded."""
  folder = store_folder(case, plans, fresh, scratch)
  kind = Start
  if case.deployment == "disaggregated":
    from resilient_moe.runtime.process.split_supervise import SplitStart

    kind = SplitStart
  start = kind(case, plans, fresh, folder, scratch, recorder)
  try:
    return start.run()
  except BaseException:
    start.close()
    raise


class Start:
  """The parts of an engine while it is put together."""

  def __init__(
    self, case: Case, plans: Plans, fresh: Fresh, folder: pathlib.Path,
    scratch: pathlib.Path, recorder: Recorder,
  ) -> None:  # fmt: skip
    self._case, self._plans, self._fresh = case, plans, fresh
    self._folder, self._scratch = folder, scratch
    self._recorder = recorder
    self._ranks = np.flatnonzero(plans.view.alive()).tolist()
    self._incarnations = dict.fromkeys(range(len(plans.view.status)), 0)
    executables = Executables(plans.shape, folder)
    self._readiness = Readiness(
      executables, folder, len(plans.view.status), recorder.write
    )
    self._cluster = Cluster(**case.cluster)
    self._begin()
    self._probes = scratch / "probes"
    self._limits = Limits(**case.detector)
    watch = Watch(self._limits, self._probes)
    self._crew = Crew(
      self._cluster, recorder.write, watch, lambda: self._signals.due()
    )
    self._signals = Signals(
      case.seed, self._pid, self._store_pid, self._struck, self._crew.strike
    )
    self._stores: Stores | None = None
    self._backend: ProcessBackend | None = None

  def _begin(self) -> None:
    """What workers wait for: programs, and the service that they join."""
    self._readiness.compile(self._sizes())
    host = self._cluster.host
    self._address = f"{host}:{_free_port(host)}"
    self._service = private.host_service(self._address, len(self._ranks))

  def run(self) -> ProcessBackend:
    stage = stages_of(self._recorder, self._fresh.generation)
    for rank in self._ranks:
      slots = tuple(self._plans.view.slots[rank].tolist())
      self._crew.start(rank, 0, self._setup(rank, slots))
    self._start_store()
    deadline = time.monotonic() + START_S
    while not all(map(self._crew.is_up, self._ranks)):
      self._check()
      if self._cluster.spawn and time.monotonic() > deadline:
        raise WorkerFailed(f"not all workers were up after {START_S:.0f} s")
      time.sleep(0.01)
    stage.done("workers")
    self._note_stages()
    self._backend = self._first_step(stage)
    return self._backend

  def _first_step(self, stage: Stages) -> ProcessBackend:
    """The backend, once every program of the first mesh has run."""
    mesh = tuple(self._plans.view.mesh.tolist())
    self._readiness.wait_compiled(len(mesh))
    stage.done("executables")
    backend = ProcessBackend(*self._parts())
    backend.load(mesh, run=True)
    backend.changed()  # everybody learns who mirrors whom
    backend.canary_token = canary(backend)
    stage.done("first_step")
    if not self._fresh.generation or self._fresh.whole:
      view, standing = self._plans.view, self._plans.standing
      self._readiness.want(view.launched, standing.ready)
    return backend

  def _sizes(self) -> set[int]:
    """Of the meshes that traffic will wait for."""
    view, standing = self._plans.view, self._plans.standing
    sizes = {len(view.mesh)}
    if self._case.wait_ready and not self._fresh.generation:
      sizes |= {len(mesh_named(view.launched, n)) for n in standing.ready}
    return sizes

  def _check(self) -> None:
    """Whoever can't start ends the start.

    Raises:
      RuntimeError: a worker or the compiler ended.
    """
    self._readiness.check_compiler()
    for rank in self._ranks:
      if not self._crew.alive(rank):
        raise WorkerFailed(f"the worker of rank {rank} did not start")

  def _setup(
    self, rank: int, slots: tuple[int, ...]
  ) -> Setup | SplitSetup:
    standing = self._plans.standing
    return Setup(
      numbers={r: i for i, r in enumerate(self._ranks)},
      incarnations=dict(self._incarnations), coordinator=self._address,
      n_devices=INCARNATIONS, platform=self._cluster.platform,
      checkpoint=self._checkpoint(),
      shape=self._plans.shape, store=self._folder, slots=slots,
      host_weights=standing.host_weights,
      mirrors=standing.checkpoint == "peer",
      streams=standing.checkpoint != "none", probes=self._probes,
    )  # fmt: skip

  def _checkpoint(self) -> str:
    return str(pathlib.Path(self._case.checkpoint).absolute())

  def _start_store(self) -> None:
    if self._plans.standing.checkpoint != "host":
      return
    config = self._plans.config
    shape = request_kv_shape(config, self._plans.shape.options)
    self._stores = Stores(
      self._n_stores(), shape, config.dtype, self._crew.authkey
    )

  def _n_stores(self) -> int:
    return 1

  def _parts(self) -> tuple[Any, ...]:
    """What a backend is made of."""
    case, plans, crew = self._case, self._plans, self._crew
    record = self._recorder.write
    injector = make_injector(case, plans, self._fresh)
    copies = KVCopies(
      plans.standing.checkpoint, crew, self._stores, plans.shape.options.rows,
      record,
    )  # fmt: skip
    crew.epoch = plans.view.epoch
    return (
      plans.view, plans.standing, plans.shape, crew, copies, self._launch,
      self._readiness, injector, self._signals, self._remember, record,
      self._recorder.now_s,
    )  # fmt: skip

  def _remember(self, injector: Injector) -> None:
    """No fault strikes again when this process is one of its victims."""
    write_text(self._scratch / INJECTOR, injector.to_json())

  def _launch(self, rank: int) -> int:
    """A replacement process: another device of the same number.

    Raises:
      WorkerFailed: the rank has been replaced as often as it can be.
    """
    if rank not in self._ranks:
      raise WorkerFailed(f"rank {rank} is not part of this engine")
    self._incarnations[rank] += 1
    incarnation = self._incarnations[rank]
    most = self._most_incarnations()
    if most is not None and incarnation >= most:
      raise WorkerFailed(
        f"rank {rank} has died {most} times; an engine has devices for "
        f"{most} processes a rank"
      )
    empty = (-1,) * self._plans.view.slots_per_rank
    self._crew.start(rank, incarnation, self._setup(rank, empty))
    return 0

  def _most_incarnations(self) -> int | None:
    """Processes that one rank can be; None: any number."""
    return INCARNATIONS

  def _note_stages(self) -> None:
    """The slowest worker's stages."""
    each: list[Mapping[str, float]] = []
    for rank in self._ranks:
      up = self._crew.mate(rank).up
      assert up is not None
      each.append(up.stages)
      if not up.native_probe:
        self._recorder.write(
          "warning", text=f"rank {rank}: no C compiler; a Python thread "
          "answers probes",
        )  # fmt: skip
    for stage in each[0]:
      seconds = max(stages[stage] for stages in each)
      self._recorder.write(
        "engine", stage=f"worker {stage}", seconds=seconds,
        generation=self._fresh.generation,
      )  # fmt: skip

  # -- what faults strike

  def _pid(self, rank: int) -> int | None:
    process = self._crew.mate(rank).process if self._crew.alive(rank) else None
    return process.pid if process is not None else None

  def _store_pid(self) -> int | None:
    """Of the first that lives."""
    pids = self._stores.pids if self._stores is not None else {}
    return next(iter(pids.values()), None)

  def _struck(self, fault: Fault) -> None:
    assert self._backend is not None
    self._backend.struck(fault)

  def close(self) -> None:
    """Ends whatever has been started."""
    self._signals.close()
    self._readiness.close()
    if self._stores is not None:
      self._stores.close()
    self._crew.close()
    self._crew.watch.close()


def _free_port(host: str) -> int:
  """A port that nobody listens on; the service takes it at once."""
  with socket.socket() as end:
    end.bind((host, 0))
    return int(end.getsockname()[1])
