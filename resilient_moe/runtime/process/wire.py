"""What the supervisor and its workers say to each other.

Each worker has two connections to the supervisor: `work`, read by its main
thread, and `control`, read by a thread of its own, so that a collective which
hangs can be aborted. Every message on `work` is a `Call`, answered (unless it
is a one-way one) by a `Reply` that carries its number and epoch: an answer to
an older call is refused.
"""

import dataclasses
import pathlib
import socket
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from resilient_moe.recovery import Role

# `as`: whoever reads this module's words finds these here, too.
from resilient_moe.runtime.process.link import AUTHKEY as AUTHKEY
from resilient_moe.runtime.process.link import Address as Address

if TYPE_CHECKING:  # a worker must not wait for JAX before it says hello
  from resilient_moe.mesh.programs import InstanceShape
  from resilient_moe.runtime.split.options import ExchangeOptions

ANY = -1  # incarnation of a worker that leaves it to the supervisor
Member = tuple[int, int]  # (rank, incarnation): one process


class Call(NamedTuple):
  """The supervisor asks; `op` is a method of `shard.Shard`."""

  number: int
  epoch: int
  op: str
  args: dict[str, Any]
  one_way: bool = False


class Reply(NamedTuple):
  """A worker answers; `error`: why it couldn't."""

  number: int
  epoch: int
  value: Any = None
  error: str = ""


class Abort(NamedTuple):
  """On `control`: these members are gone; answer `Quiet` once all waits."""

  gone: tuple[Member, ...]


class Quiet(NamedTuple):
  """The answer: every thread sleeps, as all do whose peer is dead."""


class Shut(NamedTuple):
  """On `control`, once everybody is quiet: end the collectives."""


class Strike(NamedTuple):
  """On `control`: a fault; the process sends itself this signal.

  For workers that somebody else started, perhaps on another host.
  """

  signal: int


class Tell(NamedTuple):
  """On `control`: a method that can't wait for the call that is being done."""

  op: str
  args: dict[str, Any]


class Found(NamedTuple):
  """A worker, on `control`: something that nobody has asked for."""

  name: str
  facts: dict[str, Any]


class Hello(NamedTuple):
  """The first message on a connection."""

  rank: int
  incarnation: int
  kind: str  # work or control


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a worker must know to hold its shard."""

  numbers: dict[int, int]  # rank -> number of its process in the job
  incarnations: dict[int, int]
  coordinator: str
  n_devices: int  # virtual devices a process: its possible incarnations
  platform: str
  checkpoint: str
  shape: "InstanceShape"
  store: pathlib.Path  # of executables
  slots: tuple[int, ...]  # expert in each slot; -1: empty
  host_weights: bool
  mirrors: bool  # holds other ranks' KV checkpoints
  streams: bool  # sends its own
  probes: pathlib.Path  # folder of the probe library


@dataclasses.dataclass(frozen=True)
class SplitSetup:
  """The same for a worker that attends, or holds experts, but not both."""

  incarnation: int
  role: Role
  platform: str
  checkpoint: str
  shape: "InstanceShape"
  store: pathlib.Path  # of executables
  slots: tuple[int, ...]  # expert in each slot; -1: empty
  host_weights: bool
  mirrors: bool  # holds other ranks' KV checkpoints
  streams: bool  # sends its own
  probes: pathlib.Path  # folder of the probe library
  probe_interval_s: float
  exchange: "ExchangeOptions"
  spans: pathlib.Path | None  # folder for who computed what when
  start_s: float  # of the run, monotonic


class Peer(NamedTuple):
  """Where attention workers find an expert worker."""

  desk: Address
  incarnation: int
  probe_port: int


class Up(NamedTuple):
  """A worker is ready to work."""

  data: Address
  probe_port: int
  native_probe: bool
  dense_bytes: int
  host_bytes: int
  stages: dict[str, float]  # seconds
  desk: Address | None = None  # where it takes tokens for experts


def own_host(connection: Connection) -> str:
  """The address of this end: where the other one can reach this process."""
  with socket.socket(fileno=connection.fileno()) as end:
    host = str(end.getsockname()[0])
    end.detach()
  return host


def prompt(connection: Connection) -> Connection:
  """Small messages leave at once (no Nagle): two may follow each other."""
  with socket.socket(fileno=connection.fileno()) as end:
    if end.family != getattr(socket, "AF_UNIX", None):
      end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.detach()
  return connection
