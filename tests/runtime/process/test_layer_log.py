"""Whatever workers do, and whenever they die, a store hands back a prefix.

Random interleavings against a plain model: of what reaches the mirror, message
by message, and of streams over sockets. A request's KV is a table of its life,
so that a position of the wrong step, request or life is not the right one.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from resilient_moe.runtime.process.data import DataServer
from resilient_moe.runtime.process.mirror import (
  STAGED_STEPS,
  Intake,
  KVMirror,
  Segment,
)
from resilient_moe.runtime.process.stream import KVStream

KEY = b"key of a test"
HOST = "127.0.0.1"
L, K2, T, D = 3, 2, 24, 4
SHAPE = (L, K2, T, D)
WAIT_S = 30.0
NAMES = "abcdefgh"
RANKS = 3


class Truth:
  """What the requests' KV is: by name and life, [L, 2K, T, d]."""

  def __init__(self, rng: np.random.Generator) -> None:
    self._rng = rng
    self.life: dict[str, int] = defaultdict(int)
    self._tables: dict[tuple[str, int], np.ndarray] = {}

  def __getitem__(self, name: str) -> np.ndarray:
    key = name, self.life[name]
    if key not in self._tables:
      table = self._rng.standard_normal(SHAPE).astype(np.float32)
      self._tables[key] = table
    return self._tables[key]


@dataclasses.dataclass
class Running:
  """A step that has not been committed."""

  segments: list[Segment]
  data: np.ndarray  # [L, n, 2K, d]
  lanes: list[int] | None
  left: list[int]  # layers


class Worker:
  """An attention worker: its requests' positions, its steps."""

  def __init__(self) -> None:
    self.tokens: dict[str, int] = {}
    self.running: dict[int, Running] = {}
    self.next_id = 0
    self.committed = -1
    self.staged: dict[int, set[int]] = {}  # id -> layers, as the model has it
    self.last: tuple[int, list[Segment]] | None = None

  def begin(self, rng: np.random.Generator, truth: Truth) -> None:
    """A step of some requests that are in no other, on lanes in any order."""
    busy = {s[0] for step in self.running.values() for s in step.segments}
    free = [n for n, t in self.tokens.items() if n not in busy and t < T]
    rng.shuffle(free)
    n = 12
    data = rng.standard_normal((L, n, K2, D)).astype(np.float32)
    segments: list[Segment] = []
    lane = int(rng.integers(0, 2))
    for name in free[: rng.integers(1, 4)]:
      start = self.tokens[name]
      length = int(rng.integers(1, min(3, T - start) + 1))
      new = truth[name][:, :, start : start + length]
      data[:, lane : lane + length] = new.swapaxes(1, 2)
      segments.append((name, lane, start, length))
      lane += length + int(rng.integers(0, 2))
    used = [i for _, at, _, size in segments for i in range(at, at + size)]
    lanes = used if rng.random() < 0.5 else None
    left = [int(i) for i in rng.permutation(L)]
    self.running[self.next_id] = Running(segments, data, lanes, left)
    self.next_id += int(rng.integers(1, 3))

  def logged(self, rng: np.random.Generator) -> tuple[int, int, Running]:
    """Takes a layer that is still to be logged: the step's id, the layer."""
    number = int(rng.choice([i for i, r in self.running.items() if r.left]))
    return number, self.running[number].left.pop(), self.running[number]

  def advance(self, segments: list[Segment]) -> None:
    for name, _, start, length in segments:
      if name in self.tokens:  # it may have ended meanwhile
        self.tokens[name] = start + length


class Plain:
  """The model: what is mirrored and what was refused, in dicts."""

  def __init__(self, rng: np.random.Generator) -> None:
    self.rng = rng
    self.truth = Truth(rng)
    self.workers = [Worker() for _ in range(RANKS)]
    self.mirrored: dict[str, int] = {}
    self.refused: list[set[str]] = [set() for _ in range(RANKS)]
    for name in NAMES:
      self.owner(name).tokens[name] = 0

  def owner(self, name: str) -> Worker:
    for worker in self.workers:
      if name in worker.tokens:
        return worker
    return self.workers[self.rng.integers(RANKS)]

  def log(self, rank: int, number: int, layer: int) -> None:
    worker = self.workers[rank]
    worker.staged.setdefault(number, set()).add(layer)
    if len(worker.staged) > STAGED_STEPS:
      del worker.staged[min(worker.staged)]

  def commit(self, rank: int, number: int, segments: list[Segment]) -> None:
    worker = self.workers[rank]
    if number == worker.committed:
      return
    if len(worker.staged.get(number, ())) < L:
      self.refused[rank] |= {name for name, *_ in segments}
      return
    worker.committed = number
    worker.staged = {i: s for i, s in worker.staged.items() if i > number}
    for name, _, start, length in segments:
      if start == 0:
        self.refused[rank].discard(name)
      if start > self.mirrored.get(name, 0):
        self.refused[rank].add(name)
      else:
        tokens = max(self.mirrored.get(name, 0) if start else 0, start + length)
        self.mirrored[name] = tokens

  def die(self, rank: int) -> None:
    """Others go on with what is mirrored; a new process has its rank."""
    dead, self.workers[rank] = self.workers[rank], Worker()
    self.refused[rank] = set()
    for name in dead.tokens:
      worker = self.workers[self.rng.integers(RANKS)]
      worker.tokens[name] = self.mirrored.get(name, 0)

  def check(self, mirror: KVMirror) -> None:
    assert mirror.records() == self.mirrored
    for name in NAMES:
      kv = mirror.get(name)
      tokens = self.mirrored.get(name, 0)
      if kv is None:
        assert not tokens
      else:
        np.testing.assert_array_equal(kv, self.truth[name][:, :, :tokens])


class Messages:
  """Does with an `Intake` for each rank what the model says."""

  def __init__(self, rng: np.random.Generator) -> None:
    self.rng, self.model = rng, Plain(rng)
    self.mirror = KVMirror(SHAPE, "float32")
    self.intakes = [Intake(self.mirror) for _ in range(RANKS)]

  def act(self, action: str) -> None:
    self.rank = int(self.rng.integers(RANKS))
    self.worker = self.model.workers[self.rank]
    self.intake = self.intakes[self.rank]
    getattr(self, action)()

  def begin(self) -> None:
    if len(self.worker.running) < 2:
      self.worker.begin(self.rng, self.model.truth)

  def log(self) -> None:
    if any(step.left for step in self.worker.running.values()):
      number, layer, step = self.worker.logged(self.rng)
      data = step.data[layer]
      if step.lanes is not None:
        data = data[step.lanes]
      self.intake.log(number, layer, step.lanes, data)
      if number > self.worker.committed:
        self.model.log(self.rank, number, layer)

  def lose(self) -> None:
    """A layer is dropped on the way: its step is torn."""
    if any(step.left for step in self.worker.running.values()):
      self.worker.logged(self.rng)

  def commit(self) -> None:
    over = [i for i, step in self.worker.running.items() if not step.left]
    if over:
      number = int(self.rng.choice(over))
      segments = self.worker.running.pop(number).segments
      self.intake.commit(number, segments)
      self.model.commit(self.rank, number, segments)
      self.worker.advance(segments)
      self.worker.last = number, segments

  def repeat(self) -> None:
    """A commit record comes twice."""
    if self.worker.last is not None:
      self.intake.commit(*self.worker.last)
      self.model.commit(self.rank, *self.worker.last)

  def abort(self) -> None:
    if self.worker.running:
      del self.worker.running[int(self.rng.choice([*self.worker.running]))]

  def die(self) -> None:
    self.model.die(self.rank)
    self.intakes[self.rank] = Intake(self.mirror)

  def forget(self) -> None:
    """A request ends, and another one takes its name."""
    if self.worker.tokens:
      name = str(self.rng.choice([*self.worker.tokens]))
      for number, step in list(self.worker.running.items()):
        if name in {s[0] for s in step.segments}:
          del self.worker.running[number]  # it runs no more
      if self.worker.last and name in {s[0] for s in self.worker.last[1]}:
        self.worker.last = None
      self.intake.forget([name])
      self.model.mirrored.pop(name, None)
      self.model.refused[self.rank].discard(name)
      self.model.truth.life[name] += 1
      del self.worker.tokens[name]
      self.model.workers[self.rng.integers(RANKS)].tokens[name] = 0

  def rebase(self) -> None:
    names = [n for n, tokens in self.worker.tokens.items() if tokens]
    if names:
      name = str(self.rng.choice(names))
      tokens = self.worker.tokens[name]
      self.intake.rebase(name, self.model.truth[name][:, :, :tokens])
      self.model.mirrored[name] = tokens
      self.model.refused[self.rank].discard(name)

  def ask(self) -> None:
    refused = set(self.intake.take_refused())
    assert refused == self.model.refused[self.rank]
    self.model.refused[self.rank] = set()


# How often each happens.
ACTIONS = {
  "begin": 20, "log": 60, "commit": 24, "lose": 1, "repeat": 3, "abort": 4,
  "die": 1, "forget": 2, "rebase": 3, "ask": 5,
}  # fmt: skip


@pytest.mark.parametrize("number", range(12))
def test_messages_leave_what_a_plain_model_says(number, rng):
  run = Messages(rng)
  weights = np.array([*ACTIONS.values()], float)
  mirrored = 0
  for action in rng.choice([*ACTIONS], 1500, p=weights / weights.sum()):
    run.act(str(action))
    run.model.check(run.mirror)
    mirrored = max(mirrored, sum(run.model.mirrored.values()))
  assert mirrored > T, "little was tried"


@pytest.fixture
def server() -> Iterator[DataServer]:
  made = DataServer(HOST, KEY, KVMirror(SHAPE, "float32"), {})
  yield made
  made.close()
  assert made.complaints == []


class Streams:
  """Workers that stream to a server; what has arrived when one dies is open."""

  def __init__(self, rng: np.random.Generator, server: DataServer) -> None:
    self.rng, self.server = rng, server
    self.truth = Truth(rng)
    self.workers = [Worker() for _ in range(RANKS)]
    self.streams = [self._connect(rank) for rank in range(RANKS)]
    for i, name in enumerate(NAMES):
      self.workers[i % RANKS].tokens[name] = 0

  def _connect(self, rank: int) -> KVStream:
    seed = int(self.rng.integers(2**31))
    own = np.random.default_rng(seed)  # asked in the stream's thread
    idle = (lambda: bool(own.random() < 0.3)) if seed % 3 else None
    stream = KVStream(rank, KEY, pytest.fail, idle, 0.002)
    stream.target(self.server.address)
    return stream

  def step(self, rank: int) -> None:
    """A step: done, aborted on the way, or cut short by a death."""
    worker, stream = self.workers[rank], self.streams[rank]
    worker.begin(self.rng, self.truth)
    ending = self.rng.choice(["done", "aborted", "dead"], p=[0.87, 0.1, 0.03])
    some = L if ending == "done" else int(self.rng.integers(0, L + 1))
    for _ in range(some):
      number, layer, step = worker.logged(self.rng)
      stream.log(number, layer, step.data[layer], step.lanes)
    ((number, step),) = worker.running.items()
    worker.running.clear()
    if ending == "done":
      stream.commit(number, step.segments)
      worker.advance(step.segments)
    elif ending == "dead":
      self.die(rank)

  def die(self, rank: int) -> None:
    dead = self.workers[rank]
    if self.rng.random() < 0.5:
      assert self.streams[rank].drain(WAIT_S)
      exact = True
    else:
      exact = False  # the end of the queue dies with it
    self.streams[rank].close()
    assert self.server.streams_ended(rank, WAIT_S)
    records = self.check(dead, exact)
    self.workers[rank], self.streams[rank] = Worker(), self._connect(rank)
    for name in dead.tokens:
      heir = int(self.rng.integers(RANKS))
      self.workers[heir].tokens[name] = records.get(name, 0)

  def forget(self, rank: int) -> None:
    worker = self.workers[rank]
    if worker.tokens:
      name = str(self.rng.choice([*worker.tokens]))
      self.streams[rank].forget([name])
      # Another stream is read by another thread, in no order with this one.
      assert self.streams[rank].drain(WAIT_S)
      self.truth.life[name] += 1
      del worker.tokens[name]
      self.workers[self.rng.integers(RANKS)].tokens[name] = 0

  def rebase(self, rank: int) -> None:
    names = [n for n, tokens in self.workers[rank].tokens.items() if tokens]
    if names:
      name = str(self.rng.choice(names))
      tokens = self.workers[rank].tokens[name]
      self.streams[rank].rebase(name, self.truth[name][:, :, :tokens])

  def peek(self, rank: int) -> None:
    """While streams are on their way."""
    self.check(self.workers[rank], exact=False)

  def check(self, worker: Worker, exact: bool) -> dict[str, int]:
    """A worker's requests are there, in whole or as a prefix."""
    found = {}
    for name, tokens in worker.tokens.items():
      kv = self.server._mirror.get(name)
      found[name] = 0 if kv is None else kv.shape[2]
      assert found[name] == tokens if exact else found[name] <= tokens
      if kv is not None:
        prefix = self.truth[name][:, :, : kv.shape[2]]
        np.testing.assert_array_equal(kv, prefix)
    return found


@pytest.mark.parametrize("number", range(4))
def test_streams_leave_what_was_committed(number, server, rng):
  run = Streams(rng, server)
  for _ in range(300):
    action = rng.choice(
      ["step", "peek", "forget", "rebase", "die"],
      p=[0.72, 0.2, 0.03, 0.04, 0.01],
    )
    getattr(run, action)(int(rng.integers(RANKS)))
  for rank, stream in enumerate(run.streams):
    assert stream.drain(WAIT_S)
    assert stream.take_refused() == set()
    run.check(run.workers[rank], exact=True)
    stream.close()
