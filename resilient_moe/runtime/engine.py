"""The engine's process: serves a case, behind the gateway.

  python -m resilient_moe.runtime.engine FD

FD is a socket to the gateway. The first message says what to serve; then come
requests; events go back. A plan that restarts the instance ends this process:
the gateway starts a fresh one.
"""

import pathlib
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from resilient_moe.faults import parse_schedule
from resilient_moe.runtime.case import Case
from resilient_moe.runtime.channel import (
  Channel,
  ChannelRecorder,
  Message,
  request_from_json,
)
from resilient_moe.runtime.parent import die_with_parent
from resilient_moe.serving.carry import EngineRestart
from resilient_moe.serving.loop import serve
from resilient_moe.serving.recover import Unrecoverable
from resilient_moe.serving.request import Request


class ChannelIntake:
  """Requests that come over the channel (`serving.loop.Intake`)."""

  def __init__(self, channel: Channel, early: list[Message]) -> None:
    """`early`: messages that came with the first one."""
    self._channel = channel
    self._early = early
    self._later: list[tuple[Request, tuple[int, ...]]] = []
    self._closed = False

  def poll(self, step: int) -> list[tuple[Request, tuple[int, ...]]]:
    early, self._early = self._early, []
    for message in early + self._channel.receive():
      if "close" in message:
        self._closed = True
      else:
        request = request_from_json(message["request"])
        self._later.append((request, tuple(message["tokens"])))
    if self._channel.closed:
      raise SystemExit("the gateway is gone")
    now = [x for x in self._later if (x[0].arrival_step or 0) <= step]
    self._later = [x for x in self._later if (x[0].arrival_step or 0) > step]
    return now

  def next_step(self) -> int | None:
    steps = [x[0].arrival_step or 0 for x in self._later]
    return min(steps, default=None)

  def closed(self) -> bool:
    return self._closed and not self._later


def case_from_json(fields: Message) -> Case:
  """The inverse of `gateway.case_to_json`; its requests come by themselves."""
  faults = parse_schedule(fields.pop("faults"), fields.pop("n_ranks"))
  return Case(**{**fields, "faults": faults, "requests": ()})


def main(fd: int) -> int:
  """Serves until the gateway closes the intake; the exit status."""
  die_with_parent()
  channel = Channel(socket.socket(fileno=fd))
  message, early = channel.first()
  recorder = ChannelRecorder(channel.send_line, message["start_s"])
  try:
    _serve(channel, ChannelIntake(channel, early), recorder, message)
    channel.send({"control": "done"})
  except EngineRestart:
    pass  # `_serve` has said so
  except (Unrecoverable, ValueError) as error:
    channel.send({"control": "error", "message": str(error)})
    return 1
  return 0


def _serve(
  channel: Channel,
  intake: ChannelIntake,
  recorder: ChannelRecorder,
  message: Message,
) -> None:
  generation = message["fresh"]["generation"]
  recorder.write(
    "engine", stage="spawn", generation=generation,
    seconds=time.monotonic() - message["spawned_s"],
  )  # fmt: skip
  since = time.monotonic()
  from resilient_moe.runtime import assemble

  fresh = assemble.Fresh(**_tuples(message["fresh"]))
  case = case_from_json(message["case"])
  put_together = _runtime(case, assemble)
  recorder.write(
    "engine", stage="import", seconds=time.monotonic() - since,
    generation=generation,
  )  # fmt: skip
  plans = assemble.plan_instance(case, fresh)
  scratch = pathlib.Path(message["scratch"])
  backend = put_together(case, plans, fresh, scratch, recorder)
  try:
    _prepare(case, plans, fresh, backend, recorder)
    _run(channel, intake, plans, fresh, backend, recorder)
  finally:
    backend.close()


def _runtime(case: Case, assemble: Any) -> Callable[..., Any]:
  """What puts a backend together."""
  if case.runtime == "process":
    from resilient_moe.runtime.process import supervise

    return supervise.assemble
  devices = _devices(case)
  if case.deployment == "disaggregated":
    from resilient_moe.runtime.split import start as assemble
  return lambda case, plans, fresh, scratch, recorder: assemble.assemble(
    case, plans, fresh, devices, scratch, recorder
  )


def _devices(case: Case) -> list:
  """One device a rank; virtual ones on CPU."""
  import jax

  from resilient_moe.runtime.case import make_policy

  n = case.ranks + make_policy(case).spares
  # A cold start must be cold: no run is served by another's executables.
  jax.config.update("jax_enable_compilation_cache", False)
  if case.runtime == "logical":
    return jax.devices()[:1] * n
  jax.config.update("jax_num_cpu_devices", n)
  devices = jax.devices()
  if len(devices) < n:
    raise ValueError(
      f"{case.policy} on {case.ranks} ranks needs {n} devices; there are "
      f"{len(devices)}; use runtime=logical to run all ranks on one"
    )
  return devices[:n]


def _prepare(
  case: Case, plans: Any, fresh: Any, backend: Any, recorder: ChannelRecorder
) -> None:
  """Holds traffic until the ready meshes are ready, if the case says so."""
  start = time.monotonic()
  if case.wait_ready and not fresh.generation:
    backend.wait_ready()
  if not fresh.generation:
    standing = plans.standing
    recorder.write(
      "prepare", seconds=time.monotonic() - start,
      redundancy_bytes=backend.redundancy_bytes(plans),
      ready_meshes=len(standing.ready), checkpoint=standing.checkpoint,
      spares=plans.policy.spares, **backend.held_open(),
    )  # fmt: skip
    return
  recorder.write(
    "action", part="resume", name="RestartInstance", tier="disk", bytes=0,
    explain=f"restarted on {len(fresh.ranks)} ranks",
    seconds=recorder.now_s() - fresh.began_s,
    outcome="stored" if fresh.cache else "compiled",
  )  # fmt: skip
  recorder.write("resumed", epoch=backend.view().epoch, paused=fresh.paused)


def _run(
  channel: Channel, intake: ChannelIntake, plans: Any, fresh: Any,
  backend: Any, recorder: ChannelRecorder,
) -> None:  # fmt: skip
  steps = {"next": fresh.first_step}

  def on_step(number: int, seconds: float) -> None:
    del seconds
    steps["next"] = max(steps["next"], number + 1)  # ends out of order

  try:
    serve(
      intake, backend, plans.policy, recorder.write,
      chunk=plans.shape.options.chunk, first_step=fresh.first_step,
      on_step=on_step,
    )  # fmt: skip
  except EngineRestart as restart:
    channel.send({"control": "restart", "fresh": _successor(
      restart, fresh, backend, recorder, steps["next"])})  # fmt: skip
    raise


def _successor(
  restart: EngineRestart, fresh: Any, backend: Any,
  recorder: ChannelRecorder, first_step: int,
) -> Message:  # fmt: skip
  """What the next engine must know."""
  from resilient_moe.recovery import Status

  view = backend.view()
  dead = [r for r, s in enumerate(view.status) if s == Status.LOST]
  return {
    "generation": fresh.generation + 1,
    "ranks": list(restart.action.ranks),
    "dead": dead,
    "epoch": view.epoch,
    "first_step": first_step,
    "injector": backend.injector.to_json(),
    "began_s": recorder.now_s(),
    "paused": sorted(restart.state.sequences),
    "cache": restart.action.cache,
  }


def _tuples(fields: Message) -> Message:
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


if __name__ == "__main__":
  sys.exit(main(int(sys.argv[1])))

