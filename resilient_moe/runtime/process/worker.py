"""A worker: one rank's shard on its own device, in a process of its own.

  python -m resilient_moe.runtime.process.worker rank=3 incarnation=0 HOST:PORT

`rank=auto incarnation=-1` takes the rank from the cluster that JAX detects, for
workers that a scheduler starts on other hosts; they need the supervisor's key
in RMOE_AUTHKEY.

A worker does what the supervisor's calls say (`wire.py`) and knows nothing of
requests: losing it loses arrays, which are elsewhere or can be computed again.
"""

import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any, Protocol

from resilient_moe.runtime.parent import die_with_parent
from resilient_moe.runtime.process.wire import (
  AUTHKEY,
  Call,
  Found,
  Hello,
  Member,
  Quiet,
  Reply,
  Setup,
  Shut,
  SplitSetup,
  Strike,
  Tell,
  Up,
  own_host,
  prompt,
)

ENDED = 3  # exit status of a worker whose supervisor is gone
SHARDS = {  # by what describes them; named, as a worker must greet before JAX
  Setup: ("resilient_moe.runtime.process.shard", "Shard"),
  SplitSetup: ("resilient_moe.runtime.process.split_shard", "SplitShard"),
}


class Served(Protocol):
  """A shard of any kind; calls name its other methods (`wire.Call`)."""

  up: Up
  say: Callable[[Found], None]  # to the supervisor, from any thread

  def abort(self, gone: tuple[Member, ...]) -> None:
    """Nobody waits for these any more, once all wait (control thread)."""

  def shut(self) -> None:
    """Ends the collectives with processes that are gone (control thread)."""


def _shard_for(setup: Any) -> Callable[..., Served]:
  """What makes the shard of a setup; only importing it brings JAX."""
  module, name = SHARDS[type(setup)]
  kind: Callable[..., Served] = getattr(importlib.import_module(module), name)
  return kind


def serve(shard: Served, work: Connection) -> None:
  """Does calls in their order, for ever; EOFError at the supervisor's end."""
  error = ""  # of one-way calls too: told with the next reply
  while True:
    call: Call = work.recv()
    value = None
    try:
      value = getattr(shard, call.op)(**call.args)
    except Exception as caught:  # noqa: BLE001 - the supervisor decides
      error = error or f"{type(caught).__name__}: {caught}"
    if not call.one_way:
      work.send(Reply(call.number, call.epoch, value, error))
      error = ""


class Speaker:
  """The control connection's way out, which several threads share."""

  def __init__(self, control: Connection) -> None:
    self._control = control
    self._lock = threading.Lock()

  def say(self, message: Quiet | Found) -> None:
    with self._lock:
      self._control.send(message)


def _listen(
  holder: list[Served], control: Connection, speaker: Speaker
) -> None:
  """Aborts what it is told to; ends with the supervisor."""
  while True:
    try:
      told = control.recv()
    except (EOFError, OSError):
      os._exit(ENDED)
    if isinstance(told, Strike):
      os.kill(os.getpid(), told.signal)
    elif isinstance(told, Shut):
      if holder:
        holder[0].shut()
    elif isinstance(told, Tell):
      if holder:
        getattr(holder[0], told.op)(**told.args)
    else:
      if holder:
        holder[0].abort(told.gone)
      speaker.say(Quiet())


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
  holder: list[Served] = []
  speaker = Speaker(control)
  threading.Thread(
    target=_listen, args=(holder, control, speaker), daemon=True
  ).start()
  try:
    setup = work.recv()
    try:
      shard = _shard_for(setup)(rank, setup, authkey, own_host(work))
    except Exception as error:  # noqa: BLE001 - told, then ended
      reason = "".join(traceback.format_exception(error))
      work.send(Reply(0, 0, None, reason))
      os._exit(1)
    shard.say = speaker.say
    holder.append(shard)
    work.send(Reply(0, 0, shard.up))
    serve(shard, work)
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
