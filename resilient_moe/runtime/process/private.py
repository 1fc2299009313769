"""PRIVATE: every private JAX name of the process runtime.

What JAX has no public door for yet: a coordination service that outlives
every worker, a worker that comes back under the same number, and the end of a
collective whose peer is dead. `tests/runtime/process/test_private.py` says
which name is missing when a JAX version moves one. How they are used is told in
the README, "Processes that are really killed" and "Design".
"""

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax._src.lib import _jax  # type: ignore[attr-defined]

# The service must not decide who is dead: the supervisor's detector does.
HEARTBEAT_S = 600
SHUTDOWN_S = 5
QUIET_S = 0.1  # at most, until all threads of a survivor sleep


def host_service(address: str, n_workers: int) -> Any:
  """Hosts the coordination service, in the supervisor.

  A worker that hosted it would take everybody with it. Keep the result: the
  service ends with it.
  """
  return _jax.get_distributed_runtime_service(
    address, n_workers, heartbeat_timeout=HEARTBEAT_S,
    shutdown_timeout=SHUTDOWN_S, recoverable=True,
  )  # fmt: skip


def configure(n_devices: int, host: str, platform: str) -> None:
  """JAX's settings of a worker; before anything else asks JAX.

  Args:
    n_devices: virtual devices, on CPU.
    host: this process's address, which gloo listens on.
    platform: cpu, cuda or tpu.
  """
  for name, value in {
    "jax_enable_recoverability": True,
    "jax_enable_preemption_service": False,  # it swallows SIGTERM
    "jax_enable_compilation_cache": False,  # executables belong to one run
  }.items():
    jax.config.update(name, value)
  if platform != "cpu":
    return
  jax.config.update("jax_num_cpu_devices", n_devices)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  make = _jax.make_gloo_tcp_collectives
  # By itself gloo listens on whatever the host's name resolves to.
  _jax.make_gloo_tcp_collectives = functools.partial(make, hostname=host)


def join(address: str, n_workers: int, number: int, again: bool) -> None:
  """Enters the job as worker `number`; `again`: one of it has died before."""
  jax.distributed.initialize(
    address, n_workers, number, heartbeat_timeout_seconds=HEARTBEAT_S,
    coordinator_bind_address="127.0.0.1:0",
  )  # fmt: skip
  if again and number == 0:
    # Worker 0 publishes the topology, and its predecessor already has.
    client: Any = distributed.global_state.client
    client.key_value_delete("cpu:global_topology/cpu")


def cluster_rank() -> int:
  """This process's number, as JAX's own cluster detection finds it.

  Raises:
    ValueError: no cluster that JAX knows (SLURM, Kubernetes, MPI, TPU pods).
  """
  for kind in ClusterEnv._cluster_types:
    if kind.is_env_present():
      return int(kind.get_process_id())
  known = ", ".join(kind.__name__ for kind in ClusterEnv._cluster_types)
  raise ValueError(f"rank=auto: none of these clusters is here: {known}")


def local_devices(number: int) -> list[jax.Device]:
  """The virtual devices of a worker, first incarnation first."""
  return [d for d in jax.devices() if d.process_index == number]


class Connections:
  """The sockets of each mesh's communicator, so that it can be aborted.

  On CPU nothing ends a collective whose peer is dead. Shutting the sockets
  does: every blocked member raises within milliseconds. It is to gloo what
  `ncclCommAbort` is to NCCL. A mesh is named by its members in order.

  Not while a member still computes or sends, though: a send whose write fails
  is forgotten by gloo and awaited for ever (`UnboundBuffer::waitSend`, seen in
  a quarter of the aborts within 5 ms of a kill). So first all threads of all
  members must sleep (`wait_quiet`), in receives that never end.
  """

  def __init__(self) -> None:
    self._of: dict[tuple, dict[int, str]] = {}
    self._making: tuple[tuple, dict[int, str]] | None = None
    self._gone: set = set()
    self._lock = threading.Lock()

  def made_by(self, mesh: tuple, run: Callable[[], Any]) -> Any:
    """Runs a program; the sockets that appear meanwhile are the mesh's.

    Raises:
      ConnectionAbortedError: a member is gone; nobody would answer.
    """
    before = _sockets() if mesh not in self._of else {}
    with self._lock:
      if gone := self._gone.intersection(mesh):
        raise ConnectionAbortedError(f"member(s) {sorted(gone)} are gone")
      known = mesh in self._of
      self._making = None if known else (mesh, before)
    try:
      return run()
    finally:
      with self._lock:
        if not known and not self._gone.intersection(mesh):
          self._of[mesh] = _appeared(before)
        self._making = None

  def forsake(self, gone: Iterable) -> None:
    """No collective with these members begins any more."""
    with self._lock:
      self._gone.update(gone)

  def abort(self) -> None:
    """Ends the collectives that run with members that are gone."""
    with self._lock:
      dead = [m for m in self._of if self._gone.intersection(m)]
      found = [item for mesh in dead for item in self._of.pop(mesh).items()]
      if self._making and self._gone.intersection(self._making[0]):
        found += _appeared(self._making[1]).items()
    libc, now = ctypes.CDLL(None), _sockets()
    for fd, name in found:
      if now.get(fd) == name:  # else the number is another socket's by now
        libc.shutdown(fd, 2)

  def count(self) -> int:
    """Open connections of all meshes."""
    with self._lock:
      return sum(len(fds) for fds in self._of.values())


def _appeared(before: dict[int, str]) -> dict[int, str]:
  return {fd: s for fd, s in _sockets().items() if before.get(fd) != s}


def _sockets() -> dict[int, str]:
  """The sockets of this process, by file descriptor."""
  found = {}
  for name in os.listdir("/proc/self/fd"):
    try:
      target = os.readlink(f"/proc/self/fd/{name}")
    except OSError:
      continue  # closed since it was listed
    if target.startswith("socket:"):
      found[int(name)] = target
  return found


def wait_quiet() -> None:
  """Waits until every other thread of this process sleeps, twice in a row."""
  deadline = time.monotonic() + QUIET_S
  quiet = 0
  while quiet < 2 and time.monotonic() < deadline:
    quiet = 0 if _busy() else quiet + 1
    time.sleep(0.0005)


def _busy() -> bool:
  """Whether a thread beside this one runs, or could."""
  own = str(threading.get_native_id())
  for thread in os.listdir("/proc/self/task"):
    if thread == own:
      continue
    try:
      file = os.open(f"/proc/self/task/{thread}/stat", os.O_RDONLY)
    except OSError:
      continue  # it ended
    try:
      text = os.read(file, 128)  # cheaper than a file object, for 100 threads
    except OSError:
      continue
    finally:
      os.close(file)
    if text[text.rfind(b")") + 2 :][:1] == b"R":
      return True
  return False
