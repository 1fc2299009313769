"""The event history of a run: the contract between runtimes and the report.

A run writes one JSON object a line, in the order in which things happened.
Everything that is said about a run later (verdicts, numbers, figures) is
derived from these lines and from nothing else. Every event has

  event  its name, one of the table below
  t      seconds since the run's start, on the monotonic clock (virtual time
         in the simulator); where an event has a duration, t is its end

and the fields below; those marked ? may be left out or null. Other fields may
be added freely. A `request_id` is an int or a string, unique in the run.
A position counts from the first prompt token (0), so the first token that a
request emits has position len(prompt_tokens).

  run          policy, scenario, runtime (emulated | logical | process |
               simulated), deployment (collocated | disaggregated), seed,
               ranks, lossless, fails_requests, exact; the first event. `exact`
               false: the backend can't be bit exact. Optional:
               `expected_faults` (how many `fault` events a complete run
               has), `overhead` (steady-state slowdown, from a benchmark),
               `timing` (simulated: what seconds were calibrated on)
  engine       stage (spawn | import | weights | executables | first_step |
               serving | ...), seconds, generation (0: first engine; 1: after
               the first restart; ...)
  prepare      seconds, redundancy_bytes, ready_meshes, checkpoint (none |
               peer | host), spares, connections? (between processes, that
               all meshes keep open)
  mesh_ready   absent [ranks], seconds
  accepted     request_id, prompt_tokens [ints], max_new_tokens, retry_of?
               (the failed request that the client sends again); the promise
               to answer starts here
  shed         request_id, reason; refused at admission
  admitted     request_id, rank, row, step
  step         step, epoch, bucket (prefill chunk width; 0: decode only),
               seconds, prefill_tokens, emitted [[request_id, position,
               token], ...]; t is when the tokens left the gateway
  step_failed  step, epoch; nothing of it was committed or emitted
  finished     request_id, reason (length | stop | ...), tokens (how many
               were emitted)
  failed       request_id, reason; the policy ended it. A client's retry is
               a new `accepted` with `retry_of`
  fault        kind, ranks, phase, step, affected [request_ids on the lost
               ranks]; ground truth, from the injector
  failure      kind, ranks, epoch; what the detector reported
  plan         policy, epoch, resume [lines], repair [lines], paused
               [request_ids], seconds; t is when the plan was ready
  infeasible   policy, reason
  action       part (resume | repair), name, explain, seconds, bytes, tier?,
               outcome
  resumed      epoch, paused [request_ids]
  redundancy   full, epoch
  exchange     sent_bytes, returned_bytes; embeddings between attention and
               expert ranks, replays included
  healed       by, rank, layer, experts, seconds; attention rank `by` had the
               same embeddings computed elsewhere when `rank` owed them
  epoch        epoch, mesh [ranks]; the membership from here on. The gateway
               keeps counting over a restart of the engine
  stale        epoch, rank; work of an older epoch that was refused
  requests_moved  kind (restore | recompute | requeue), request_ids, tokens
               (prefilled again), bytes (of KV restored)
  checkpoint   bytes_total, lag_steps
  replayed     request_id, margin, limit; a finished answer, replayed teacher
               forced on the fault-free run: the largest logit margin by which
               a token misses the fault-free choice, and the stated limit.
               Needed only where `exact` is false and the tokens differ
  warning      text
  end          (no fields); the last event
"""

import abc
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Event = dict[str, Any]
RequestId = int | str

# Required fields; the optional ones are in the docstring above.
SCHEMA: dict[str, tuple[str, ...]] = {
    name: tuple(fields.split())
    for name, fields in {
        "accepted": "request_id prompt_tokens max_new_tokens",
        "action": "part name explain seconds bytes outcome",
        "admitted": "request_id rank row step",
        "checkpoint": "bytes_total lag_steps",
        "end": "",
        "engine": "stage seconds generation",
        "epoch": "epoch mesh",
        "failed": "request_id reason",
        "failure": "kind ranks epoch",
        "fault": "kind ranks phase step affected",
        "exchange": "sent_bytes returned_bytes",
        "healed": "by rank layer experts seconds",
        "finished": "request_id reason tokens",
        "infeasible": "policy reason",
        "mesh_ready": "absent seconds",
        "plan": "policy epoch resume repair paused seconds",
        "prepare": "seconds redundancy_bytes ready_meshes checkpoint spares",
        "redundancy": "full epoch",
        "replayed": "request_id margin limit",
        "requests_moved": "kind request_ids tokens bytes",
        "resumed": "epoch paused",
        "run": (
            "policy scenario runtime deployment seed ranks lossless"
            " fails_requests exact"
        ),
        "shed": "request_id reason",
        "stale": "epoch rank",
        "step": "step epoch bucket seconds prefill_tokens emitted",
        "step_failed": "step epoch",
        "warning": "text",
    }.items()
}


def _plain(value: Any) -> Any:
  """JSON for what isn't JSON: NumPy scalars and arrays, sets."""
  if isinstance(value, (set, frozenset)):
    return sorted(value)
  if hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(
      f"{value!r} ({type(value).__name__}) can't be in a history; write "
      "numbers, strings, lists, dicts or None"
  )


def _encode(event: str, t: float, fields: dict[str, Any]) -> str:
  if event not in SCHEMA:
    raise ValueError(
        f"unknown event {event!r}; choices: {', '.join(sorted(SCHEMA))}"
    )
  missing = [name for name in SCHEMA[event] if name not in fields]
  if missing:
    raise ValueError(f"event {event!r} lacks {', '.join(missing)}")
  record = {"event": event, "t": float(t), **fields}
  # NaN is not JSON, and a NaN in a history would spread into every number.
  return json.dumps(record, default=_plain, allow_nan=False)


class Recorder(abc.ABC):
  """Whatever a run can write its events to. Threads may share one."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self.start_s = clock()
    self._lock = threading.Lock()

  def now_s(self) -> float:
    """Seconds since the run's start."""
    return self._clock() - self.start_s

  def write(self, event: str, t: float | None = None, **fields: Any) -> None:
    """Records an event; `t` in seconds since the start, default now."""
    with self._lock:
      at_s = self.now_s() if t is None else t
      self._record(_encode(event, at_s, fields))

  @abc.abstractmethod
  def _record(self, line: str) -> None:
    """Takes one event as a line of JSON."""


class History(Recorder, list[Event]):
  """A list of events, as `read_history` would give them back."""

  def _record(self, line: str) -> None:
    self.append(json.loads(line))


class HistoryWriter(Recorder):
  """Events to a file: one JSON line each, flushed at once."""

  def __init__(
      self,
      path: str | pathlib.Path,
      clock: Callable[[], float] = time.monotonic,
      after_s: float | None = None,
  ):
    """`after_s`: goes on with a file whose run is this many seconds old."""
    super().__init__(clock)
    if after_s is not None:
      self.start_s -= after_s
    # Open for as long as the run: no context manager can hold it here.
    self._file: TextIO = open(  # noqa: SIM115
        path, "w" if after_s is None else "a", encoding="utf-8"
    )

  def _record(self, line: str) -> None:
    self._file.write(line + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> "HistoryWriter":
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()


def _parse(line: str, where: str) -> Event:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON ({error}): {line[:60]!r}") from error
  if not isinstance(record, dict) or not {"event", "t"} <= record.keys():
    raise ValueError(f"{where}: not an event with `event` and `t`: {line[:60]}")
  return record


def _lines(path: pathlib.Path, partial_ok: bool) -> Iterator[str]:
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if line.endswith("\n"):
        yield line
      elif not partial_ok:
        raise ValueError(
            f"{path}:{number}: the last line is cut off ({line[:60]!r}); the "
            "run did not end. Read it with partial_ok=True"
        )


def read_history(
    path: str | pathlib.Path, partial_ok: bool = False
) -> list[Event]:
  """Reads a history.

  Args:
    path: a file that `HistoryWriter` made.
    partial_ok: leave out a last line that was cut off, instead of raising.

  Raises:
    ValueError: for a line that is not an event, or is cut off.
  """
  path = pathlib.Path(path)
  return [
      _parse(line, f"{path}:{number}")
      for number, line in enumerate(_lines(path, partial_ok), 1)
  ]


def run_of(events: list[Event]) -> Event:
  """The `run` event of a history; ValueError if there is none."""
  for event in events:
    if event["event"] == "run":
      return event
  raise ValueError("the history has no `run` event")


def of_kind(events: list[Event], kind: str) -> list[Event]:
  """All events called `kind`, in their order."""
  return [event for event in events if event["event"] == kind]
