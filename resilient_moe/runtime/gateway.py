"""The gateway: requests enter and tokens leave through it (no JAX).

It outlives the engine. An engine is a process behind a socket; when a plan
restarts the instance, or a supervisor is killed, the gateway starts a fresh
one and hands it every unanswered request with the tokens that have left so
far. When the gateway itself is killed, the next one goes on from the history
(`journal.py`).
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from resilient_moe.report import HistoryWriter
from resilient_moe.runtime.case import Case, RunFailed, make_policy
from resilient_moe.runtime.channel import Channel, Message, request_to_json
from resilient_moe.runtime.journal import (
  INJECTOR,
  Answer,
  Journal,
  Progress,
  read_journal,
)
from resilient_moe.runtime.parent import as_parent
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import refusal

Watch = Callable[[dict[str, Any]], None]
PARTIAL, SCRATCH = "history.jsonl.partial", "scratch"
MAX_DEATHS = 32  # of supervisors, in one run
POLL_S = 0.05
ENGINE_LOG = "engine.log"
DEFAULT_MAX_LEN = 512  # that of `model.StepOptions`, which needs JAX


def run_case(
  case: Case, folder: pathlib.Path, progress: Watch | None = None
) -> None:
  """Serves a case; leaves `history.jsonl` and `outputs.jsonl` in `folder`.

  Both appear whole at the end; while the run goes on they are `.partial`.
  Where a run of processes was killed together with its gateway, it goes on.

  Raises:
    RunFailed: the engine failed, or no policy in line could recover.
  """
  make_policy(case)  # an unknown one leaves nothing behind
  folder.mkdir(parents=True, exist_ok=True)
  partial, scratch = folder / PARTIAL, folder / SCRATCH
  journal = read_journal(partial, case.requests) if killed(folder) else None
  if journal is None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
  after_s = journal.last_s + journal.down_s if journal else None
  with HistoryWriter(partial, after_s=after_s) as history:
    gateway = Gateway(case, scratch, history, progress, journal)
    try:
      gateway.run()
    except BaseException:
      shutil.rmtree(scratch)  # it ended in order: the next one starts anew
      raise
    finally:
      gateway.close()
  outputs = folder / "outputs.jsonl.partial"
  lines = [json.dumps(o) for o in gateway.outputs()]
  outputs.write_text("".join(line + "\n" for line in lines))
  partial.rename(folder / "history.jsonl")
  outputs.rename(folder / "outputs.jsonl")
  shutil.rmtree(scratch)


def killed(folder: pathlib.Path) -> bool:
  """Whether a folder holds a run whose gateway was killed."""
  return (folder / SCRATCH).is_dir() and (folder / PARTIAL).is_file()


class Gateway:
  """One run's requests, history and engine."""

  def __init__(
    self,
    case: Case,
    scratch: pathlib.Path,
    history: HistoryWriter,
    progress: Watch | None,
    journal: Journal | None = None,
  ) -> None:
    """`journal`: what a gateway that was killed has left of this run."""
    self._case = case
    self._scratch = scratch
    self._history = history
    self._progress = progress or (lambda event: None)
    self._start_s = history.start_s
    self._journal = journal
    self._answers: dict[str, Answer] = journal.answers if journal else {}
    self._so_far = journal.progress if journal else Progress()
    self._deaths = 0  # of supervisors
    self._timed: collections.deque[Request] = collections.deque()
    self._engine: subprocess.Popen | None = None
    self._channel: Channel
    self._max_len = int(case.options.get("max_len", DEFAULT_MAX_LEN))
    self._vocab_size = _vocab_size(pathlib.Path(case.checkpoint))
    self._done = False
    self._closing = False  # whether the engine knows that no more will come

  def run(self) -> None:
    """Accepts the requests, starts an engine, serves to the end."""
    if self._journal is None:
      self._begin()
      self._spawn({"generation": 0})
    else:
      self._timed.extend(self._not_yet_accepted())
      self._write("warning", self._now(), text="resumed from the journal")
      self._spawn(self._next_instance())
    while not self._done:
      for message in self._channel.receive(POLL_S):
        if "control" in message:
          self._control(message)
        else:
          self._event(message)
      self._send_due()
      if self._channel.closed and not self._done:
        self._check_engine()
    self._write("end", self._now())

  def outputs(self) -> list[dict[str, Any]]:
    """One object a request (DESIGN section 8)."""
    return [
      {
        "request_id": name,
        "prompt_tokens": list(a.request.prompt),
        "output_tokens": a.tokens,
        "finish_reason": a.reason,
      }
      for name, a in self._answers.items()
    ]

  def close(self) -> None:
    """Leaves no process behind, however the run ended."""
    if self._engine is not None:
      _kill(self._engine)
      self._channel.close()

  # -- requests

  def _begin(self) -> None:
    policy = make_policy(self._case)
    self._write(
      "run", self._now(), policy=self._case.policy,
      scenario=self._case.scenario, runtime=self._case.runtime,
      deployment=self._case.deployment, seed=self._case.seed,
      ranks=self._case.ranks, lossless=policy.lossless,
      fails_requests=policy.fails_requests, exact=True,
      expected_faults=len(self._case.faults),
    )  # fmt: skip
    for request in self._case.requests:
      if request.arrival_s is None:
        self._accept(request)
    self._timed.extend(self._not_yet_accepted())

  def _not_yet_accepted(self) -> list[Request]:
    """Requests of the case whose moment is still to come."""
    rest = [r for r in self._case.requests if r.request_id not in self._answers]
    return sorted(rest, key=lambda r: r.arrival_s or 0.0)

  def _accept(self, request: Request) -> bool:
    """Takes a request on, or sheds it with the reason."""
    name, prompt = request.request_id, request.prompt
    reason = refusal(request, self._max_len, self._vocab_size)
    if reason is not None:
      self._write("shed", self._now(), request_id=name, reason=reason)
      self._answers[name] = Answer(request, [], f"shed: {reason}")
      return False
    self._answers[name] = Answer(request)
    self._write(
      "accepted", self._now(), request_id=name, prompt_tokens=list(prompt),
      max_new_tokens=request.max_new_tokens, retry_of=request.retry_of,
    )  # fmt: skip
    return True

  def _send(self, answer: Answer) -> None:
    self._channel.send(
      {"request": request_to_json(answer.request), "tokens": answer.tokens}
    )

  def _send_due(self) -> None:
    """Timed arrivals whose moment has come; closes the intake at the end."""
    while self._timed and (self._timed[0].arrival_s or 0) <= self._now():
      request = self._timed.popleft()
      if self._accept(request):
        self._send(self._answers[request.request_id])
    if not self._timed and not self._closing and self._all_answered():
      self._closing = True
      self._channel.send({"close": True})

  def _all_answered(self) -> bool:
    return all(a.reason for a in self._answers.values())

  # -- the engine

  def _spawn(self, fresh: Message) -> None:
    """Starts an engine process and hands it what is unanswered."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    spawned = time.monotonic()
    log = self._scratch.parent / ENGINE_LOG
    with log.open("a") as stderr:
      self._engine = subprocess.Popen(
        [sys.executable, "-m", "resilient_moe.runtime.engine", str(fd)],
        pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
        env={**os.environ, **as_parent(), **_environment(self._case)},
        start_new_session=True,  # so that `_kill` reaches its helpers
      )  # fmt: skip
    theirs.close()
    self._closing = False
    self._channel = Channel(ours)
    self._channel.send({
      "start_s": self._start_s, "spawned_s": spawned, "fresh": fresh,
      "case": case_to_json(self._case), "scratch": str(self._scratch),
    })  # fmt: skip
    for answer in self._answers.values():
      if not answer.reason:
        self._send(answer)

  def _control(self, message: Message) -> None:
    if message["control"] == "error":
      raise RunFailed(message["message"])
    if message["control"] == "done":
      self._done = True
      return
    # The rest of the old engine's words come before it is replaced.
    assert self._engine is not None
    self._engine.wait()
    while not self._channel.closed:
      for event in self._channel.receive(None):
        self._event(event)
    self._channel.close()
    self._recomputed()
    self._spawn(message["fresh"])

  def _recomputed(self) -> None:
    """Every request that had tokens is prefilled again by the next engine."""
    begun = {
      name: a for name, a in self._answers.items() if a.tokens and not a.reason
    }
    tokens = sum(
      len(a.request.prompt) + len(a.tokens) - 1 for a in begun.values()
    )
    self._write(
      "requests_moved", self._now(), kind="recompute",
      request_ids=sorted(begun), tokens=tokens, bytes=0,
    )  # fmt: skip

  def _check_engine(self) -> None:
    assert self._engine is not None
    status = self._engine.wait()
    by_signal = status < 0 and self._case.runtime == "process"
    if by_signal and self._deaths < MAX_DEATHS:
      self._replace_supervisor()
      return
    log = self._scratch.parent / ENGINE_LOG
    lines = log.read_text().strip().splitlines() or ["it said nothing"]
    raise RunFailed(
      f"the engine of policy {self._case.policy!r} ended with status "
      f"{status}: {lines[-1]} (see {ENGINE_LOG})"
    )

  def _replace_supervisor(self) -> None:
    """The supervisor was killed: everything starts again, nothing is lost."""
    self._deaths += 1
    self.close()  # what is left of its session
    self._write(
      "failure", self._now(), kind="SupervisorLost", ranks=[],
      epoch=self._so_far.epoch,
    )  # fmt: skip
    self._recomputed()
    self._spawn(self._next_instance())

  def _next_instance(self) -> Message:
    """All ranks again, where the one before them was killed."""
    injector = self._scratch / INJECTOR
    in_flight = sorted(n for n, a in self._answers.items() if not a.reason)
    return {
      "generation": self._so_far.generation + 1,
      "ranks": list(range(self._case.ranks)),
      "dead": [],
      "epoch": self._so_far.epoch,
      "first_step": self._so_far.first_step,
      "injector": injector.read_text() if injector.is_file() else "",
      "began_s": self._now(),
      "paused": in_flight,
      "cache": True,
      "whole": True,
    }

  def _event(self, message: Message) -> None:
    """Tokens leave here: an engine's event enters the history."""
    event = message.pop("event")
    self._so_far.note({"event": event, **message})
    self._write(event, message.pop("t"), **message)
    if event == "step":
      for name, _, token in message["emitted"]:
        self._answers[name].tokens.append(token)
    elif event == "finished":
      self._answers[message["request_id"]].reason = message["reason"]
    elif event == "failed":
      self._retry(message["request_id"], message["reason"])

  def _retry(self, name: str, reason: str) -> None:
    """The client sends a failed request again, from the start."""
    failed = self._answers[name]
    failed.reason = f"failed: {reason}"
    root, _, attempt = name.partition("~")
    again = dataclasses.replace(
      failed.request, request_id=f"{root}~{int(attempt or 0) + 1}",
      retry_of=name, arrival_step=0, arrival_s=None,
    )  # fmt: skip
    if self._accept(again):
      self._send(self._answers[again.request_id])

  def _now(self) -> float:
    return time.monotonic() - self._start_s

  def _write(self, event: str, t: float, **fields: Any) -> None:
    self._history.write(event, t, **fields)
    self._progress({"event": event, "t": t, **fields})


def _kill(engine: subprocess.Popen) -> None:
  """Ends an engine and the compiler that it may have started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(engine.pid, signal.SIGKILL)
  engine.wait()


def _vocab_size(checkpoint: pathlib.Path) -> int:
  """The model's vocabulary, read without JAX."""
  try:
    config = json.loads((checkpoint / "config.json").read_text())
    return int(config["vocab_size"])
  except (OSError, ValueError, KeyError) as error:
    raise RunFailed(f"{checkpoint}: no checkpoint there ({error})") from error


def _environment(case: Case) -> dict[str, str]:
  """Only the logical runtime may have an accelerator."""
  return {} if case.runtime == "logical" else {"JAX_PLATFORMS": "cpu"}


def case_to_json(case: Case) -> Message:
  """A case as plain data; its requests are sent by themselves."""
  fields = dict(vars(case))
  fields.pop("requests")
  faults = [
    {k: v for k, v in dataclasses.asdict(f).items() if v is not None}
    for f in case.faults
  ]
  n_ranks = case.ranks + make_policy(case).spares
  options, kwargs = dict(case.options), dict(case.policy_kwargs)
  return {
    **fields, "faults": faults, "n_ranks": n_ranks, "options": options,
    "policy_kwargs": kwargs, "detector": dict(case.detector),
    "cluster": dict(case.cluster), "exchange": dict(case.exchange),
    "sim": dict(case.sim),
  }  # fmt: skip
