"""One worker as the supervisor knows it, and what came back of a call."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from multiprocessing import connection as mp
from typing import Any

from resilient_moe.runtime.parent import as_parent
from resilient_moe.runtime.process.cluster import Cluster
from resilient_moe.runtime.process.wire import (
  AUTHKEY,
  Address,
  Found,
  Member,
  Up,
)


class WorkerFailed(RuntimeError):
  """A worker that lives could not do what it was asked to."""


@dataclasses.dataclass
class Answers:
  """What came back of a call."""

  values: dict[int, Any]  # by rank
  errors: dict[int, str]
  lost: tuple[int, ...]  # ranks of the call that are gone

  def good(self) -> dict[int, Any]:
    """The values, if everybody answered.

    Raises:
      RanksGone: somebody is gone.
      WorkerFailed: somebody lives and failed.
    """
    if self.lost:
      raise RanksGone(self.lost)
    for rank, error in self.errors.items():
      raise WorkerFailed(f"rank {rank}: {error}")
    return self.values


class RanksGone(Exception):
  """A call could not be done: ranks that it needs are gone."""

  def __init__(self, ranks: tuple[int, ...]) -> None:
    super().__init__(f"rank(s) {list(ranks)} are gone")
    self.ranks = ranks


@dataclasses.dataclass
class Mate:
  """One worker process, seen from the supervisor."""

  rank: int
  incarnation: int
  process: subprocess.Popen | None  # None: somebody else started it
  work: mp.Connection | None = None
  control: mp.Connection | None = None
  up: Up | None = None
  quiet: bool = True  # since it was told of the last death

  @property
  def member(self) -> Member:
    return self.rank, self.incarnation


def spawn(
  rank: int, incarnation: int, door: Address, authkey: bytes, cluster: Cluster
) -> subprocess.Popen:
  """A worker process on this host, which will knock at the door."""
  host, port = door
  return subprocess.Popen(
    [sys.executable, "-m", "resilient_moe.runtime.process.worker",
     f"rank={rank}", f"incarnation={incarnation}", f"{host}:{port}"],
    stdin=subprocess.DEVNULL,
    env={**os.environ, **as_parent(), AUTHKEY: authkey.hex(),
         **cluster.environment()},
  )  # fmt: skip


def tell(mate: Mate, message: object) -> None:
  """On the control connection; whoever is gone is noticed elsewhere."""
  if mate.control is not None:
    with contextlib.suppress(OSError):
      mate.control.send(message)


def last_words(mate: Mate) -> list[Found]:
  """What a worker that has died still had to say unasked."""
  said: list[Found] = []
  with contextlib.suppress(EOFError, OSError):  # that was all
    while mate.control is not None and mate.control.poll():
      message = mate.control.recv()
      if isinstance(message, Found):
        said.append(message)
  return said


def kill(mate: Mate) -> None:
  """A process of another host ends with its connections."""
  if mate.process is not None:
    with contextlib.suppress(ProcessLookupError):
      os.kill(mate.process.pid, signal.SIGKILL)
  for end in (mate.work, mate.control):
    if end is not None:
      end.close()


def ended(mate: Mate) -> bool:
  """Whether its process is gone, and reaped."""
  return mate.process is None or mate.process.poll() is not None
