"""An engine in this process, for notebooks and for one accelerator.

No gateway stands before it, so a plan that restarts the instance has nobody
to carry it out.
"""

import collections
import pathlib
import tempfile

import jax

from resilient_moe.report import History
from resilient_moe.runtime.assemble import (
  Fresh,
  assemble,
  plan_instance,
)
from resilient_moe.runtime.case import Case, RunFailed
from resilient_moe.serving.carry import EngineRestart
from resilient_moe.serving.loop import serve
from resilient_moe.serving.recover import Unrecoverable
from resilient_moe.serving.request import Request


class ListIntake:
  """All requests are known at the start (`serving.loop.Intake`)."""

  def __init__(self, requests: tuple[Request, ...]) -> None:
    ordered = sorted(requests, key=lambda r: r.arrival_step or 0)
    self._left = collections.deque(ordered)

  def poll(self, step: int) -> list[tuple[Request, tuple[int, ...]]]:
    due: list[tuple[Request, tuple[int, ...]]] = []
    while self._left and (self._left[0].arrival_step or 0) <= step:
      due.append((self._left.popleft(), ()))
    return due

  def next_step(self) -> int | None:
    return (self._left[0].arrival_step or 0) if self._left else None

  def closed(self) -> bool:
    return not self._left


def serve_inline(case: Case) -> History:
  """Serves a case on this process's devices; its history.

  Raises:
    RunFailed: no policy could recover, or the plan restarts the instance.
  """
  history = History()
  plans = plan_instance(case, Fresh())
  n = len(plans.view.status)
  devices = jax.devices()
  if case.runtime == "logical":
    devices = devices[:1] * n
  if len(devices) < n:
    raise ValueError(f"{n} ranks on {len(devices)} devices: use `logical`")
  with tempfile.TemporaryDirectory() as scratch:
    backend = assemble(
      case, plans, Fresh(), devices[:n], pathlib.Path(scratch), history
    )
    try:
      if case.wait_ready:
        backend.wait_ready()
      history.write(
        "prepare", seconds=0.0, spares=plans.policy.spares,
        redundancy_bytes=backend.redundancy_bytes(plans),
        ready_meshes=len(plans.standing.ready),
        checkpoint=plans.standing.checkpoint,
      )  # fmt: skip
      serve(
        ListIntake(case.requests), backend, plans.policy, history.write,
        chunk=plans.shape.options.chunk,
      )  # fmt: skip
    except Unrecoverable as error:
      raise RunFailed(str(error)) from error
    except EngineRestart as restart:
      raise RunFailed(
        f"policy {case.policy!r} restarts the instance, which needs an "
        f"engine in a process of its own ({restart}); use experiments.run"
      ) from restart
    finally:
      backend.close()
  return history
