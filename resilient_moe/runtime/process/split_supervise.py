"""Starts an engine whose attention and experts are in different processes.

No coordination service and no mesh: workers know each other by their desks'
addresses. What a role computes is compiled once, by a process of its own.
"""

import subprocess

from resilient_moe.mesh.executables import Executables, write_shape
from resilient_moe.recovery import Role
from resilient_moe.runtime import ahead
from resilient_moe.runtime.execute import canary
from resilient_moe.runtime.process.backend import ProcessBackend
from resilient_moe.runtime.process.split_backend import SplitProcess
from resilient_moe.runtime.process.supervise import Start
from resilient_moe.runtime.process.wire import SplitSetup
from resilient_moe.runtime.split.families import FAMILIES
from resilient_moe.runtime.split.options import ExchangeOptions
from resilient_moe.runtime.stages import Stages

SPANS = "spans"  # folder of a run, where who computed what when is written


class SplitStart(Start):
  """The parts of a disaggregated engine while it is put together."""

  _compiler: subprocess.Popen | None = None

  def _begin(self) -> None:
    self._exchange = ExchangeOptions(**self._case.exchange)
    executables = Executables(self._plans.shape, self._folder)
    if not all(map(executables.has_programs, FAMILIES)):
      write_shape(self._plans.shape, self._folder / ahead.SHAPE_FILE)
      self._compiler = ahead.start(self._folder, 1, [], "now")

  def _check(self) -> None:
    super()._check()
    if self._compiler is not None and self._compiler.poll():
      raise RuntimeError(
        f"compiling failed with status {self._compiler.returncode}"
      )

  def _first_step(self, stage: Stages) -> ProcessBackend:
    backend = SplitProcess(*self._parts())
    backend.begin_serving()
    backend.canary_token = canary(backend)
    if self._compiler is not None:  # every program is there: it is ending
      self._compiler.wait()
    stage.done("first_step")
    return backend

  def _setup(self, rank: int, slots: tuple[int, ...]) -> SplitSetup:
    standing, view = self._plans.standing, self._plans.view
    spans = self._scratch.parent / SPANS if self._exchange.trace else None
    return SplitSetup(
      incarnation=self._incarnations[rank], role=Role(view.home[rank]),
      platform=self._cluster.platform,
      checkpoint=self._checkpoint(), shape=self._plans.shape,
      store=self._folder, slots=slots, host_weights=standing.host_weights,
      mirrors=standing.checkpoint == "peer",
      streams=standing.checkpoint != "none", probes=self._probes,
      probe_interval_s=self._limits.probe_interval_s,
      exchange=self._exchange, spans=spans, start_s=self._recorder.start_s,
    )  # fmt: skip

  def _n_stores(self) -> int:
    return self._exchange.stores

  def _most_incarnations(self) -> int | None:
    return None  # no list of devices to run out of

  def close(self) -> None:
    if self._compiler is not None:
      self._compiler.kill()
      self._compiler.wait()
    super().close()
