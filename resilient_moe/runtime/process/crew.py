"""The supervisor's workers: started, called, watched, ended.

`call` is the only way to ask them something: it sends to some, gathers their
answers, and meanwhile notices who dies. A process that begins to end, or a
closed socket, says so at once, and all the others are told to abort the
collectives that the dead one is a member of. What only looks dead is judged by
`watch.Watch`.
"""

import math
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import connection as mp
from typing import Any

from resilient_moe.runtime.process.cluster import Cluster
from resilient_moe.runtime.process.departed import Departed
from resilient_moe.runtime.process.door import Door
from resilient_moe.runtime.process.exits import exiting
from resilient_moe.runtime.process.mate import (
  Answers,
  Mate,
  WorkerFailed,
  last_words,
  spawn,
  tell,
)
from resilient_moe.runtime.process.watch import Watch
from resilient_moe.runtime.process.wire import (
  ANY,
  AUTHKEY,
  Abort,
  Call,
  Found,
  Member,
  Reply,
  Setup,
  Shut,
  SplitSetup,
  Strike,
  Tell,
)
from resilient_moe.serving.carry import Record

START_S = 120.0  # for a worker to be up
RETURN_S = 5.0  # for a survivor to come back from an aborted collective,
CONNECT_S = 45.0  # or, where connections were being made; gloo waits 30
HANG_S = 120.0  # for any call, whatever the probes say
QUIET_S = 0.15  # for all survivors of a death to wait for it
TICK_S = 0.003  # between two looks at faults to inject and at who is silent


class Crew:
  """All workers of one engine."""

  def __init__(
    self, cluster: Cluster, record: Record, watch: Watch,
    before_wait: Callable[[], None],
  ) -> None:  # fmt: skip
    """`before_wait` is called every few milliseconds while a call waits."""
    given = os.environ.get(AUTHKEY)  # workers of other hosts must have it
    self.authkey = bytes.fromhex(given) if given else secrets.token_bytes(32)
    self._cluster = cluster
    self.watch = watch
    self.epoch = 0
    self._record = record
    self._before_wait = before_wait
    # Called while a call waits: steps that were asked for may end meanwhile.
    self.meanwhile: Callable[[], None] = _nothing
    self._calling: set[int] = set()  # ranks of the call under way
    self._door = Door((cluster.host, cluster.port), self.authkey)
    self._mates: dict[int, Mate] = {}
    self._setups: dict[int, Setup | SplitSetup] = {}
    self._departed = Departed(record)
    self._ran: set[tuple[Member, ...]] = set()  # together, to the end
    self._shut_at_s: float | None = None  # an abort is under way
    self._lost: list[int] = []  # noticed, not taken yet
    self._number = 0
    self._asked: dict[int, tuple[int, float]] = {}  # rank -> number, since
    self._answered: list[tuple[int, Reply | None]] = []
    self._found: list[tuple[int, Found]] = []

  # -- who is there

  def start(
    self, rank: int, incarnation: int, setup: Setup | SplitSetup
  ) -> None:
    """Starts a process, or expects one; `is_up`: it can be called."""
    process = None
    if self._cluster.spawn:
      process = spawn(
        rank, incarnation, self._door.address, self.authkey, self._cluster
      )
    self._mates[rank] = Mate(rank, incarnation, process)
    self._setups[rank] = setup
    others = [r for r, m in self._mates.items() if m.up is not None]
    news = {"incarnations": {rank: incarnation}}
    self.tell(dict.fromkeys(others, news), "members")

  def mate(self, rank: int) -> Mate:
    return self._mates[rank]

  def alive(self, rank: int) -> bool:
    return rank in self._mates

  def ranks(self) -> tuple[int, ...]:
    """Everybody who was started and is not known to be gone."""
    return tuple(self._mates)

  def up_ranks(self) -> tuple[int, ...]:
    """Those of them that can be called."""
    return tuple(r for r in self.ranks() if self.is_up(r))

  def is_up(self, rank: int) -> bool:
    """Whether a rank that was started can be called; takes its greetings.

    Raises:
      WorkerFailed: it could not start; says why.
    """
    self._greet()
    mate = self._mates.get(rank)
    if mate is None:
      return False
    if mate.up is None and mate.work is not None and mate.work.poll():
      self._hear_first(mate)
    if mate.up is None and mate.process and mate.process.poll() is not None:
      self._bury(mate)
    present = rank in self._mates and mate.up is not None
    return present and mate.control is not None

  def _greet(self) -> None:
    for hello, connection in self._door.arrivals():
      mate = self._mates.get(hello.rank)
      if mate is None or hello.incarnation not in (mate.incarnation, ANY):
        connection.close()
        continue
      if hello.kind == "control":
        mate.control = connection
      else:
        mate.work = connection
        connection.send(self._setups[hello.rank])

  def _hear_first(self, mate: Mate) -> None:
    assert mate.work is not None
    try:
      reply: Reply = mate.work.recv()
    except (EOFError, OSError):
      self._bury(mate)
      return
    if reply.error:
      raise WorkerFailed(reply.error)
    mate.up = reply.value
    assert mate.up is not None
    # Others may have been replaced while it started.
    now = {r: m.incarnation for r, m in self._mates.items()}
    self.tell({mate.rank: {"incarnations": now}}, "members")
    self.watch.add(mate.rank, mate.up)

  # -- calls

  def tell(self, each: Mapping[int, Mapping[str, Any]], op: str) -> None:
    """A one-way call, each rank with its arguments; nobody waits."""
    self._number += 1
    for rank, args in each.items():
      self._send(rank, Call(self._number, self.epoch, op, dict(args), True))

  def call(
    self, each: Mapping[int, Mapping[str, Any]], op: str
  ) -> Answers:
    """Asks ranks, each with its arguments; gathers what they say."""
    self._number += 1
    number = self._number
    answers = Answers({}, {}, tuple(r for r in each if r not in self._mates))
    waiting: set[int] = set()
    if answers.lost:
      return answers  # nobody is sent into a collective that can't end
    for rank, args in each.items():
      if self._send(rank, Call(number, self.epoch, op, dict(args))):
        waiting.add(rank)
    members = tuple(self._mates[r].member for r in sorted(waiting))
    start = time.monotonic()
    limit = start + HANG_S
    while waiting:
      self._calling = waiting
      self.meanwhile()
      known = len(self._lost)
      for rank in self._ready(waiting):
        self._hear(rank, number, waiting, answers)
      now = time.monotonic()
      self._give_up(self.watch.stuck(waiting, now - start), waiting)
      waiting &= self._mates.keys()
      if len(self._lost) > known:
        limit = now + (RETURN_S if members in self._ran else CONNECT_S)
      if now > limit:
        self._give_up(tuple(waiting), waiting)
    self._calling = set()
    answers.lost = tuple(r for r in each if r not in self._mates)
    if not (answers.lost or answers.errors):
      self._ran.add(members)
    return answers

  def ask(self, rank: int, args: Mapping[str, Any], op: str) -> None:
    """Asks one rank and doesn't wait: see `answered`. One at a time each."""
    self._number += 1
    self._asked[rank] = self._number, time.monotonic()
    self._send(rank, Call(self._number, self.epoch, op, dict(args)))

  def answered(self, wait_s: float) -> list[tuple[int, Reply | None]]:
    """(rank, what it said to `ask`); None: it is gone. Waits for the first."""
    # Who is called may answer that first: the call will hear it.
    for rank in self._ready(set(self._asked) - self._calling, wait_s):
      self._hear(rank, -1, set(), Answers({}, {}, ()))
    now = time.monotonic()
    for rank, (_, since) in list(self._asked.items()):
      self._give_up(self.watch.stuck([rank], now - since), {rank})
      if rank not in self._mates:
        del self._asked[rank]
        self._answered.append((rank, None))
    said, self._answered = self._answered, []
    return said

  def found(self) -> list[tuple[int, Found]]:
    """What workers have said unasked, since the last time."""
    found, self._found = self._found, []
    return found

  def inform(self, each: Mapping[int, Mapping[str, Any]], op: str) -> None:
    """A method that can't wait for the call that a worker is doing."""
    for rank, args in each.items():
      if (mate := self._mates.get(rank)) is not None:
        tell(mate, Tell(op, dict(args)))

  def _send(self, rank: int, call: Call) -> bool:
    mate = self._mates.get(rank)
    if mate is None or mate.work is None:
      return False
    try:
      mate.work.send(call)
    except OSError:
      self._bury(mate)
      return False
    return True

  def _ready(self, waiting: set[int], wait_s: float = TICK_S) -> list[int]:
    """Ranks that have said something, or died; waits a tick at most."""
    self._before_wait()
    found = self._wait(wait_s)
    return [rank for rank in found if rank in waiting]

  def _wait(self, wait_s: float) -> list[int]:
    """Looks at everybody; buries the dead, refuses the fenced."""
    for mate in list(self._mates.values()):
      if mate.process is not None and exiting(mate.process.pid):
        self._bury(mate)
    # Any: the stubs of `wait` know no keys of a dict.
    mates = self._mates.values()
    of: dict[Any, Mate] = {m.work: m for m in mates if m.work is not None}
    old = self._departed.speakers()
    controls: dict[Any, Mate] = {
      m.control: m for m in mates if m.control is not None
    }
    heard = []
    for end in mp.wait([*of, *old, *controls], wait_s):
      if end in old:
        self._departed.refuse(old[end])
      elif end in controls:
        self._hear_quiet(controls[end])
      elif of[end].up is not None:
        heard.append(of[end].rank)
    self._shut_when_quiet()
    return heard

  def _hear_quiet(self, mate: Mate) -> None:
    """All that a worker says on its control connection, but its end."""
    assert mate.control is not None
    try:
      said = mate.control.recv()
      if isinstance(said, Found):
        self._found.append((mate.rank, said))
      else:
        mate.quiet = True
    except (EOFError, OSError):
      self._bury(mate)

  def _shut_when_quiet(self) -> None:
    """The second half of an abort: nobody is in the middle of a send."""
    if self._shut_at_s is None:
      return
    mates = [m for m in self._mates.values() if m.control is not None]
    late = time.monotonic() > self._shut_at_s
    if late or all(mate.quiet for mate in mates):
      self._shut_at_s = None
      for mate in mates:
        tell(mate, Shut())

  def _hear(
    self, rank: int, number: int, waiting: set[int], answers: Answers
  ) -> None:
    mate = self._mates.get(rank)
    if mate is None or mate.work is None:
      return
    try:
      reply: Reply = mate.work.recv()
    except (EOFError, OSError):
      self._bury(mate)
      return
    if reply.number == self._asked.get(rank, (0, 0.0))[0]:
      del self._asked[rank]
      self._answered.append((rank, reply))
      return
    if reply.number != number:
      self._record("stale", epoch=reply.epoch, rank=rank)
      return
    waiting.discard(rank)
    if reply.error:
      answers.errors[rank] = reply.error
    else:
      answers.values[rank] = reply.value

  # -- ends

  def look(self) -> None:
    """Notices who died, without waiting; kills who was fenced long ago."""
    self._before_wait()
    for rank in self._wait(0.0):
      # Nobody was asked anything: an end of file, or an answer too late.
      self._hear(rank, -1, set(), Answers({}, {}, ()))
    self._departed.reap()

  def take_lost(self) -> tuple[int, ...]:
    """Ranks that are gone since the last time this was asked."""
    lost, self._lost = tuple(self._lost), []
    return lost

  def lingers(self, rank: int) -> bool:
    """Whether a process of the rank is fenced and not killed yet."""
    return self._departed.lingers(rank)

  def _bury(self, mate: Mate) -> None:
    """A worker is dead: whoever waits for it in a collective is freed."""
    if self._mates.get(mate.rank) is not mate:
      return
    self._found += [(mate.rank, found) for found in last_words(mate)]
    self._remove(mate)
    self._lost.append(mate.rank)
    self._departed.kill(mate)

  def _remove(self, mate: Mate) -> None:
    del self._mates[mate.rank]
    self.watch.remove(mate.rank)
    self._shut_at_s = time.monotonic() + QUIET_S
    for other in self._mates.values():
      other.quiet = other.control is None
      tell(other, Abort((mate.member,)))

  def _give_up(self, ranks: tuple[int, ...], waiting: set[int]) -> None:
    """Fences workers that live and don't answer; they are killed later."""
    for rank in ranks:
      if rank in self._mates and rank in waiting:
        self._record(
          "warning", text=f"rank {rank} is alive and does not answer: fenced"
        )
        self._lost.append(rank)
        self.fence(rank)

  def give_up_silent(self, ranks: Iterable[int]) -> None:
    """Fences those that have been silent for too long, though not called."""
    self._give_up(self.watch.stuck(ranks, math.inf), set(ranks))

  def strike(self, rank: int, number: signal.Signals) -> None:
    """A fault: a worker, wherever it is, sends itself a signal."""
    mate = self._mates.get(rank)
    if mate is None:
      return
    tell(mate, Strike(number))

  def fence(self, rank: int) -> None:
    """Nothing that a worker still says counts; it is killed after a grace."""
    mate = self._mates.get(rank)
    if mate is None:
      return
    self._remove(mate)
    self._departed.fence(mate, self.watch.limits.grace_s)

  def close(self) -> None:
    """Ends every process."""
    self._door.close()
    for mate in self._mates.values():
      self._departed.kill(mate)
    self._departed.close()


def _nothing() -> None:
  pass
