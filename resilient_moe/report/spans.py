"""Spans: which process computed what, and when.

Each process of a run records its own: one JSON object a line, in
`rank<rank>.<incarnation>.jsonl`, where the incarnation counts the processes
that this rank has had (0: the first). A span has

  name    what was done
  t0, t1  from when to when, in seconds since the run's start
  rank    of the process
  role    what the process is: attention, expert, collocated, orchestrator, ...
  args    whatever else is known of it

The monotonic clock is the same in all processes of a machine, so spans and
the history of a run share one time axis.
"""

import collections
import contextlib
import json
import math
import pathlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO

from resilient_moe.report.runs import Path

Span = dict[str, Any]

_FIELDS = {"name", "t0", "t1", "rank", "role", "args"}
_NOTHING = contextlib.nullcontext()


def _plain(value: Any) -> Any:
  """JSON for NumPy's scalars and arrays, which workers count in."""
  if hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(
      f"{value!r} ({type(value).__name__}) can't be in a span; write numbers, "
      "strings, lists, dicts or None"
  )


_encode = json.JSONEncoder(default=_plain, allow_nan=False).encode


class _Open:
  """A span that runs while its block does."""

  __slots__ = ("_args", "_name", "_spans", "_start_s")

  def __init__(self, spans: "Spans", name: str, args: dict[str, Any]):
    self._spans, self._name, self._args = spans, name, args

  def __enter__(self) -> None:
    self._start_s = self._spans.clock()

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: TracebackType | None,
  ) -> None:
    if kind is not None:
      self._args["error"] = kind.__name__
    end_s = self._spans.clock()
    self._spans.add(self._name, self._start_s, end_s, **self._args)


def _create(folder: pathlib.Path, rank: int) -> BinaryIO:
  """The file of the next incarnation; never that of an earlier process."""
  folder.mkdir(parents=True, exist_ok=True)
  incarnation = 0
  while True:
    try:
      return (folder / f"rank{rank}.{incarnation}.jsonl").open("xb")
    except FileExistsError:
      incarnation += 1


class Spans:
  """Records the spans of this process. Threads may share one.

  Spans are kept in memory and written out in bunches: to record one costs
  about a microsecond, to write it out two more. A process that is killed loses
  those since the last `flush`: fewer than `limit`, and no more than `every_s`
  seconds of them if it kept recording. Nothing flushes a process that records
  nothing: one that is about to wait should `flush` by itself, which is also
  when it costs nobody.

  Attributes:
    clock: what `start_s` and the times of spans are read from.
  """

  def __init__(
      self,
      folder: Path | None,
      rank: int,
      role: str,
      start_s: float,
      limit: int = 256,
      every_s: float = 0.25,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Opens a new file in `folder`.

    Args:
      folder: where the files of all processes lie; None: record nothing.
      rank: of this process.
      role: what it is.
      start_s: the run's start on `clock` (`Recorder.start_s`).
      limit: how many spans to keep in memory.
      every_s: for how many seconds to keep them.
      clock: a clock that all processes share.
    """
    self.clock = clock
    self._start_s = start_s
    self._limit, self._every_s = limit, every_s
    self._due_s = -math.inf if folder is None else clock() + every_s
    # A deque, because threads append while another one takes away.
    self._waiting: collections.deque[tuple[str, float, float, Any]] = (
        collections.deque()
    )
    self._lock = threading.Lock()
    self._tail = f', "rank": {int(rank)}, "role": {_encode(role)}, "args": '
    self._file = None if folder is None else _create(pathlib.Path(folder), rank)

  def add(
      self, name: str, start_s: float, end_s: float, /, **args: Any
  ) -> None:
    """Records a span; times on the clock. `args`: numbers, strings, lists."""
    if self._file is None:
      return
    self._waiting.append((name, start_s, end_s, args))
    if len(self._waiting) >= self._limit or end_s >= self._due_s:
      self.flush()

  def span(
      self, name: str, /, **args: Any
  ) -> contextlib.AbstractContextManager[None]:
    """A context that is recorded as a span, even if it raises."""
    return _NOTHING if self._file is None else _Open(self, name, args)

  def flush(self) -> None:
    """Hands what was recorded to the system, which outlives this process."""
    with self._lock:
      if self._file is None:
        return
      lines = []
      while self._waiting:
        lines.append(self._line(*self._waiting.popleft()))
      self._file.write("".join(lines).encode())
      self._file.flush()
      self._due_s = self.clock() + self._every_s

  def _line(self, name: str, start_s: float, end_s: float, args: Any) -> str:
    # By hand: half the time of encoding a dict. Nanoseconds are plenty.
    t0, t1 = start_s - self._start_s, end_s - self._start_s
    if not (math.isfinite(t0) and math.isfinite(t1)):
      raise ValueError(f"span {name!r}: times {start_s!r} to {end_s!r}")
    return (
        f'{{"name": {_encode(name)}, "t0": {t0:.9f}, "t1": {t1:.9f}'
        f"{self._tail}{_encode(args) if args else '{}'}}}\n"
    )

  def close(self) -> None:
    """Writes out the rest. What is added from here on is not recorded."""
    self.flush()
    with self._lock:
      if self._file is not None:
        self._file.close()
        self._file = None

  def __enter__(self) -> "Spans":
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()


def _parse(line: str, where: str) -> Span:
  try:
    span = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON ({error}): {line[:60]!r}") from error
  if not isinstance(span, dict) or not span.keys() >= _FIELDS:
    raise ValueError(f"{where}: not a span: {line[:60]!r}")
  return span


def read_spans(folder: Path) -> list[Span]:
  """The spans of all processes of a run, in the order in which they began.

  A last line that was cut off, because its process was killed, is left out.
  Each span gets its `incarnation`, from the name of its file.

  Raises:
    ValueError: for any other line that is not a span.
  """
  spans: list[Span] = []
  for path in sorted(pathlib.Path(folder).glob("rank*.*.jsonl")):
    incarnation = int(path.name.split(".")[1])
    # No decoding before the cut: it may lie within a character.
    *whole, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
      span = _parse(line.decode(), f"{path}:{number}")
      spans.append(span | {"incarnation": incarnation})
  return sorted(spans, key=lambda span: (span["t0"], span["t1"]))
