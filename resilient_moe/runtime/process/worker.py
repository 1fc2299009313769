"""A worker: one rank's shard on its own device, in a process of its own.

  python -m resilient_moe.runtime.process.worker rank=3 incarnation=0 HOST:PORT

`rank=auto incarnation=-1` takes the rank from the cluster that JAX detects, for
workers that a scheduler starts on other hosts; they need the supervisor's key
in RMOE_AUTHKEY.

A worker does what the supervisor's calls say (`wire.py`) and knows nothing of
requests: losing it loses arrays, which are elsewhere or can be computed again.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np

from resilient_moe.runtime.parent import die_with_parent
from resilient_moe.runtime.process.data import PullFailed
from resilient_moe.runtime.process.wire import (
  AUTHKEY,
  Address,
  Call,
  Hello,
  Member,
  Quiet,
  Reply,
  Setup,
  Shut,
  Strike,
  Up,
  own_host,
  prompt,
)

Mesh = tuple[int, ...]
ENDED = 3  # exit status of a worker whose supervisor is gone


class Worker:
  """The methods that calls name; each returns what its reply carries."""

  def __init__(
    self, rank: int, setup: Setup, authkey: bytes, host: str
  ) -> None:
    from resilient_moe.runtime.process.shard import Shard

    self._shard = Shard(rank, setup, authkey, host)
    self._delta: Any = None  # of the last step, until it is committed
    self._commit_s = 0.0  # of the step before
    self.late_error = ""  # of a one-way call; told with the next reply

  def up(self) -> Up:
    return self._shard.up

  def members(self, incarnations: dict[int, int]) -> None:
    """Which process is which rank from here on."""
    self._shard.members(incarnations)

  def load(self, mesh: Mesh) -> str:
    """Loads a mesh's step programs; where they came from."""
    return self._shard.load(mesh)

  def ready(self, mesh: Mesh, width: int, routing: dict) -> float:
    """Runs one program of a mesh on idle rows; seconds."""
    start = time.monotonic()
    self._shard.make_ready(mesh, width, routing)
    return time.monotonic() - start

  def routing(self, routing: dict) -> None:
    """The routing arrays of the mesh that serves."""
    self._shard.set_routing(routing)

  def step(
    self, mesh: Mesh, width: int, ints: np.ndarray
  ) -> tuple:
    """One step: own tokens [1, B + 1], seconds without and with collectives.

    Behind them what is to be said of the stream (`Shard.refused`).
    """
    start = time.monotonic()
    delta, tokens, packed, launched = self._shard.run(mesh, width, ints)
    end = time.monotonic()
    self._delta = (mesh, width, delta, packed)
    own_s, self._commit_s = launched - start + self._commit_s, 0.0
    return tokens, own_s, end - launched, *self._shard.refused()

  def commit(self, segments: list, retired: tuple[str, ...]) -> None:
    """The step counts: its delta goes into the cache and to the mirror."""
    mesh, width, delta, packed = self._delta
    self._delta = None
    start = time.monotonic()
    self._shard.commit(mesh, width, delta, packed)
    self._commit_s = time.monotonic() - start
    self._shard.stream(segments, delta, retired)

  def fill(self, fills: list[dict[str, Any]]) -> int:
    """Experts' weights into slots; bytes."""
    return sum(self._shard.fill(**fill) for fill in fills)

  def rows(
    self, rows: list[dict[str, Any]]
  ) -> list[tuple[str, int, int, str]]:
    """KV of requests into rows: (request, positions, bytes, why not)."""
    said = []
    for fields in rows:
      name = fields.pop("request_id")
      try:
        said.append((name, *self._shard.row(**fields), ""))
      except (ConnectionError, PullFailed) as error:
        said.append((name, 0, 0, str(error)))
    return said

  def stream_to(self, address: Address | None) -> None:
    """Where this rank's KV checkpoints go from here on."""
    self._shard.stream_to(address)

  def rebase(self, request_id: str, row: int, tokens: int) -> None:
    """Streams a request's whole KV anew."""
    self._shard.rebase(request_id, row, tokens)

  def records(self, ended: Iterable[int]) -> dict[str, int]:
    """What is mirrored here, once all that `ended` had sent is read."""
    return self._shard.records(ended)

  def connections(self) -> int:
    """Sockets of this process that meshes keep open."""
    return self._shard.connections()

  def done(self) -> int:
    """All calls before this one are done; KV bytes streamed so far."""
    return self._shard.settled()

  def abort(self, gone: tuple[Member, ...]) -> None:
    """Nobody waits for these any more, once all wait (control thread)."""
    self._shard.abort(gone)

  def shut(self) -> None:
    """Ends the collectives with processes that are gone."""
    self._shard.shut()


def serve(worker: Worker, work: Connection) -> None:
  """Does calls in their order, for ever; EOFError at the supervisor's end."""
  while True:
    call: Call = work.recv()
    error, value = "", None
    try:
      value = getattr(worker, call.op)(**call.args)
    except Exception as caught:  # noqa: BLE001 - the supervisor decides
      error = f"{type(caught).__name__}: {caught}"
    if call.one_way:
      worker.late_error = worker.late_error or error
      continue
    error, worker.late_error = worker.late_error or error, ""
    work.send(Reply(call.number, call.epoch, value, error))


def _listen(worker: list[Worker], control: Connection) -> None:
  """Aborts what it is told to; ends with the supervisor."""
  while True:
    try:
      told = control.recv()
    except (EOFError, OSError):
      os._exit(ENDED)
    if isinstance(told, Strike):
      os.kill(os.getpid(), told.signal)
    elif isinstance(told, Shut):
      if worker:
        worker[0].shut()
    else:
      if worker:
        worker[0].abort(told.gone)
      control.send(Quiet())


def main(argv: list[str]) -> None:
  """Runs one worker until the supervisor's sockets close."""
  die_with_parent()
  fields = dict(arg.split("=") for arg in argv[:2])
  rank = _rank(fields["rank"])
  incarnation = int(fields["incarnation"])
  host, port = argv[2].rsplit(":", 1)
  authkey = bytes.fromhex(os.environ[AUTHKEY])

  def connect(kind: str) -> Connection:
    connection = prompt(Client((host, int(port)), authkey=authkey))
    connection.send(Hello(rank, incarnation, kind))
    return connection

  work, control = connect("work"), connect("control")
  holder: list[Worker] = []
  threading.Thread(target=_listen, args=(holder, control), daemon=True).start()
  try:
    setup: Setup = work.recv()
    try:
      holder.append(Worker(rank, setup, authkey, own_host(work)))
    except Exception as error:  # noqa: BLE001 - told, then ended
      reason = "".join(traceback.format_exception(error))
      work.send(Reply(0, 0, None, reason))
      os._exit(1)
    work.send(Reply(0, 0, holder[0].up()))
    serve(holder[0], work)
  except (EOFError, OSError):
    os._exit(ENDED)  # at once: a thread may hang in a collective


def _rank(text: str) -> int:
  """`auto`: what the cluster that this process runs in says."""
  if text != "auto":
    return int(text)
  from resilient_moe.runtime.process import private

  return private.cluster_rank()


if __name__ == "__main__":
  main(sys.argv[1:])
