"""Measures ways to send a layer's tokens to another CPU process and back.

  python -m experiments.bench_transport [--rounds=1000]

A round trip is one [n, D] float32 array there and one of the same size back,
which is what an attention worker waits for at every MoE layer; nothing is
computed, and each way gets its array as it likes it. The ways take turns in
blocks, so that what else the machine does meets all of them. Prints a Markdown
table of medians and 99th percentiles.

  transfer server  jax.experimental.transfer, a pull in each direction
  sockets          what the runtime uses: `Peers` and `Desk` (frames, tickets,
                   checks, a selector over all links)
  shared memory    the bytes in shared memory, a socket's byte to wake: one
                   link, no frames, no checks; a bound
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports JAX

import numpy as np

from experiments.provenance import provenance
from resilient_moe.datapath.gather import GatherLimits
from resilient_moe.datapath.parcels import Parcel, Result
from resilient_moe.runtime.process.desk import Desk
from resilient_moe.runtime.process.peers import Peers

SIZES = ((8, 128), (16, 512), (64, 512), (256, 2048))
BLOCK = 100  # round trips before the next way's turn
WARM_UP = 20
HOST = "127.0.0.1"
KEY = b"transport"
WAIT_S = 30.0
END_S = 5.0  # for a child to end by itself
TRANSFER, SOCKETS, SHARED = "transfer server", "sockets", "shared memory"

Trip = Callable[[], Any]  # what came back


@contextlib.contextmanager
def _child(serve: Callable[..., None], *args: object) -> Iterator[Connection]:
  """A process that runs `serve(pipe, *args)` and ends with the block."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(target=serve, args=(theirs, *args), daemon=True)
  process.start()
  theirs.close()
  try:
    yield ours
  finally:
    ours.close()  # which `serve` takes for the end
    process.join(END_S)
    if process.is_alive():
      process.kill()
      process.join()


def _until_end(pipe: Connection) -> None:
  with contextlib.suppress(EOFError):
    pipe.recv()


@contextlib.contextmanager
def sockets(x: np.ndarray, trips: int) -> Iterator[Trip]:
  """The runtime's links."""
  index = np.arange(len(x), dtype=np.int32)
  with _child(_serve_sockets) as pipe:
    peers = Peers(0, 0, KEY, lambda rank: True)
    peers.connect(1, pipe.recv(), 0)

    def trip() -> np.ndarray:
      peers.send(1, 0, Parcel(0, x, index, index))
      (come,) = peers.receive(WAIT_S)
      assert isinstance(come, Result)
      return come.y

    try:
      yield trip
    finally:
      peers.close()


def _serve_sockets(pipe: Connection) -> None:
  same = lambda layer, rows, token, slot: rows
  desk = Desk(HOST, KEY, same, GatherLimits())
  pipe.send(desk.address)
  _until_end(pipe)
  desk.close()


@contextlib.contextmanager
def shared(x: np.ndarray, trips: int) -> Iterator[Trip]:
  """One block of memory for each direction."""
  with contextlib.ExitStack() as stack:
    blocks = [stack.enter_context(_block(x.nbytes)) for _ in range(2)]
    listener = stack.enter_context(socket.create_server((HOST, 0)))
    listener.settimeout(WAIT_S)
    names = [block.name for block in blocks]
    address = listener.getsockname()
    stack.enter_context(_child(_serve_shared, address, names, x.shape))
    end = stack.enter_context(listener.accept()[0])
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def trip() -> np.ndarray:
      _view(blocks[0], x.shape)[:] = x
      end.send(b"x")
      end.recv(1)
      return _view(blocks[1], x.shape).copy()

    yield trip


@contextlib.contextmanager
def _block(nbytes: int) -> Iterator[shared_memory.SharedMemory]:
  block = shared_memory.SharedMemory(create=True, size=nbytes)
  try:
    yield block
  finally:
    block.close()
    block.unlink()


def _serve_shared(
  pipe: Connection, address: tuple[str, int], names: Sequence[str],
  shape: tuple[int, ...],
) -> None:  # fmt: skip
  there, back = (shared_memory.SharedMemory(name) for name in names)
  with socket.create_connection(address) as end:
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while end.recv(1):
      _view(back, shape)[:] = _view(there, shape)
      end.send(b"x")
  there.close()
  back.close()


def _view(
  block: shared_memory.SharedMemory, shape: tuple[int, ...]
) -> np.ndarray:
  return np.ndarray(shape, np.float32, block.buf)


@contextlib.contextmanager
def transfer(x: np.ndarray, trips: int) -> Iterator[Trip]:
  """JAX's transfer server in both processes; serves just so many trips."""
  import jax

  with _child(_serve_transfer, x.shape, trips) as pipe:
    server, spec = _transfer_server(x.shape)
    pipe.send(server.address())
    link = server.connect(pipe.recv())
    here = jax.device_put(x)
    names = iter(range(0, 2 * trips, 2))

    def trip() -> jax.Array:
      name = next(names)
      server.await_pull(name, [here])
      return link.pull(name + 1, [spec])[0].block_until_ready()

    yield trip


def _serve_transfer(
  pipe: Connection, shape: tuple[int, ...], trips: int
) -> None:
  server, spec = _transfer_server(shape)
  link = server.connect(pipe.recv())
  pipe.send(server.address())
  for name in range(0, 2 * trips, 2):
    (x,) = link.pull(name, [spec])
    server.await_pull(name + 1, [x.block_until_ready()])
  _until_end(pipe)  # the last answer is pulled from here


def _transfer_server(shape: tuple[int, ...]) -> tuple[Any, Any]:
  import jax
  from jax.experimental.transfer import start_transfer_server

  (device, *_) = jax.devices()
  address = f"{HOST}:0"
  server = start_transfer_server(device.client, address, [address])
  sharding = jax.sharding.SingleDeviceSharding(device)
  return server, jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)


WAYS = {TRANSFER: transfer, SOCKETS: sockets, SHARED: shared}


def measure(n: int, width: int, rounds: int) -> dict[str, np.ndarray]:
  """Microseconds of every round trip, by way."""
  x = np.random.default_rng(0).random((n, width), np.float32)
  spent: dict[str, list[float]] = {way: [] for way in WAYS}
  with contextlib.ExitStack() as stack:
    trips = {
      way: stack.enter_context(opened(x, WARM_UP + rounds))
      for way, opened in WAYS.items()
    }
    for trip in trips.values():
      for _ in range(WARM_UP):
        np.testing.assert_array_equal(np.asarray(trip()), x)
    for start in range(0, rounds, BLOCK):
      for way, trip in trips.items():
        for _ in range(min(BLOCK, rounds - start)):
          began = time.perf_counter_ns()
          trip()
          spent[way].append((time.perf_counter_ns() - began) / 1e3)
  return {way: np.array(samples) for way, samples in spent.items()}


def table(found: dict[tuple[int, int], dict[str, np.ndarray]]) -> str:
  """Median and 99th percentile of each size and way."""
  lines = [
    f"| round trip, us: median (p99) | {' | '.join(WAYS)} |",
    "|---" * (len(WAYS) + 1) + "|",
  ]
  for (n, width), spent in found.items():
    cells = [
      f"{np.median(samples):.0f} ({np.percentile(samples, 99):.0f})"
      for samples in spent.values()
    ]
    lines.append(f"| {n} x {width} float32 | {' | '.join(cells)} |")
  return "\n".join(lines)


def verdict(found: dict[tuple[int, int], dict[str, np.ndarray]]) -> str:
  """What the runtime keeps, beside what that costs or saves."""
  of = lambda spent, way: np.median(spent[way]) / np.median(spent[SOCKETS])
  ratios = lambda way: ", ".join(f"{of(s, way):.2f}" for s in found.values())
  return (
    f"Kept: {SOCKETS}. The transfer server takes {ratios(TRANSFER)} of their "
    f"time by size, shared memory {ratios(SHARED)}; but shared memory ends at "
    "the machine, and it needs the frames, the links and the end of a dead "
    "process from sockets all the same."
  )


def machine() -> str:
  """What the numbers depend on, the load of others included."""
  about = provenance("experiments.bench_transport", sys.argv, "emulated", 1)
  names = ("python", "jax", "numpy")
  versions = ", ".join(f"{name} {about['versions'][name]}" for name in names)
  return (
    f"{about['processor']}, {about['cores']} cores, {about['platform']}, "
    f"{versions}, load {os.getloadavg()[0]:.1f}"
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Measures all and prints it."""
  parser = argparse.ArgumentParser(description="Round trips by transport.")
  parser.add_argument("--rounds", type=int, default=1000)
  rounds = parser.parse_args(argv).rounds
  if rounds < 1:
    parser.error(f"--rounds is {rounds}; needed is at least 1")
  print(f"{machine()}; {rounds} round trips between two processes\n")
  found = {size: measure(*size, rounds) for size in SIZES}
  print(table(found), verdict(found), sep="\n\n")


if __name__ == "__main__":
  main()
