"""One simulated run: the gateway's and the engine's part, in virtual time.

What `runtime.gateway` and `runtime.engine` do with processes and sockets: they
accept and shed requests, hand unanswered ones with their tokens to a fresh
engine after a restart, and let clients send failed requests again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from resilient_moe import recovery as rm
from resilient_moe.faults import Injector
from resilient_moe.recovery.opening import Restarted, opening
from resilient_moe.recovery.reserve import reserve_bytes
from resilient_moe.report import Recorder
from resilient_moe.serving.carry import EngineRestart
from resilient_moe.serving.loop import serve
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import refusal
from resilient_moe.sim.backend import SimulatedBackend
from resilient_moe.sim.case import SimulatedCase
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.split import SplitSimulated
from resilient_moe.sim.timing import PART, Timing

Watch = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class Answer:
  """A request as its client sees it."""

  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  reason: str = ""  # why it ended; "": in flight


class _Fresh(NamedTuple):
  """What an engine takes over from the one before it."""

  restarted: Restarted
  generation: int
  first_step: int
  began_s: float
  paused: list[str]


class Run:
  """One run's requests, history and engines."""

  def __init__(
    self, case: SimulatedCase, timing: Timing, clock: VirtualClock,
    history: Recorder, watch: Watch | None = None,
  ) -> None:  # fmt: skip
    """`history` must have been made with `clock.now`."""
    self._case, self._timing, self._clock = case, timing, clock
    self._history = history
    self._watch = watch or (lambda event: None)
    self.answers: dict[str, Answer] = {}
    self._timed = 0  # requests that are still to come
    self._intake = _Intake(self)
    self._injector = Injector(case.faults)
    self._next_step = 0
    self.backends: list[SimulatedBackend] = []  # one an engine

  def run(self) -> None:
    """Serves the case to its end.

    Raises:
      Unrecoverable: no policy in line can recover.
    """
    case = self._case
    self.write(
      "run", policy=case.name, scenario=case.scenario, runtime="simulated",
      deployment=case.deployment, seed=case.seed, ranks=case.ranks,
      lossless=case.policy.lossless, fails_requests=case.policy.fails_requests,
      exact=True, expected_faults=len(case.faults), timing=self._timing.note,
    )  # fmt: skip
    for request in case.requests:
      self._expect(request)
    fresh: _Fresh | None = None
    while (after := self._engine(fresh)) is not None:
      fresh = after
    self.write("end")

  def write(self, event: str, t: float | None = None, **fields: Any) -> None:
    """An event of the history; tokens leave here."""
    t = self._clock.now() if t is None else t
    self._history.write(event, t, **fields)
    self._watch({"event": event, "t": t, **fields})
    if event == "step":
      self._next_step = max(self._next_step, fields["step"] + 1)
      for name, _, token in fields["emitted"]:
        self.answers[name].tokens.append(token)
    elif event == "finished":
      self.answers[fields["request_id"]].reason = fields["reason"]
    elif event == "failed":
      self._retry(fields["request_id"], fields["reason"])

  # -- requests

  def _expect(self, request: Request) -> None:
    """Counted in steps, it is known at once; in seconds, at its moment."""
    if request.arrival_s is None:
      self._accept(request)
      return
    self._timed += 1

    def arrive() -> None:
      self._timed -= 1
      self._accept(request)

    self._clock.at(request.arrival_s, arrive)

  def _accept(self, request: Request) -> None:
    """Takes a request on, or sheds it with the reason."""
    name, case = request.request_id, self._case
    answer = self.answers[name] = Answer(request)
    reason = refusal(request, case.max_len, case.model.vocab_size)
    if reason is not None:
      self.write("shed", request_id=name, reason=reason)
      answer.reason = f"shed: {reason}"
      return
    self.write(
      "accepted", request_id=name, prompt_tokens=list(request.prompt),
      max_new_tokens=request.max_new_tokens, retry_of=request.retry_of,
    )  # fmt: skip
    self._intake.send(answer)

  def _retry(self, name: str, reason: str) -> None:
    """The client sends a failed request again, from the start."""
    failed = self.answers[name]
    failed.reason = f"failed: {reason}"
    root, _, attempt = name.partition("~")
    self._intake.again.append(dataclasses.replace(
      failed.request, request_id=f"{root}~{int(attempt or 0) + 1}",
      retry_of=name, arrival_step=0, arrival_s=None,
    ))  # fmt: skip

  def closed(self) -> bool:
    """Whether no further request can come."""
    answered = all(a.reason for a in self.answers.values())
    return not self._timed and not self._intake.again and answered

  # -- engines

  def _engine(self, fresh: _Fresh | None) -> _Fresh | None:
    """One engine's life; what the next takes over, if it is restarted."""
    case, timing, clock = self._case, self._timing, self._clock
    restarted = fresh.restarted if fresh else None
    generation = fresh.generation if fresh else 0
    bare = bare_view(case)
    standing = case.policy.prepare(bare)
    view = opening(bare, standing, restarted)
    cache = restarted.cache if restarted else False
    for stage, seconds in timing.start(view, generation, cache):
      if not stage.startswith(PART):  # else it is in another one
        clock.spend(seconds)
      self.write(
        "engine", stage=stage, seconds=seconds, generation=generation
      )
    kind = SplitSimulated if case.attention else SimulatedBackend
    backend = kind(
      case, view, standing, timing, clock, self._injector, self.write
    )
    self.backends.append(backend)
    self._prepare(backend, standing, fresh)
    policy = dataclasses.replace(case.policy, recover=self._recover)
    try:
      serve(
        self._intake, backend, policy, self.write, chunk=case.chunk,
        first_step=fresh.first_step if fresh else 0, clock=clock,
      )  # fmt: skip
    except EngineRestart as restart:
      return self._successor(restart, backend, generation)
    finally:
      backend.close()
    return None

  def _recover(
    self, view: rm.ClusterView, failure: rm.Failure
  ) -> rm.Plan | rm.Infeasible:
    """The policy's plan, and the time that it takes."""
    self._clock.spend(self._timing.plan_s(self._case.name))
    return self._case.policy.recover(view, failure)

  def _prepare(
    self, backend: SimulatedBackend, standing: rm.Standing,
    fresh: _Fresh | None,
  ) -> None:  # fmt: skip
    """Holds traffic until the ready meshes are ready, if the case says so."""
    clock, view = self._clock, backend.view()
    if fresh is not None:
      restarted = fresh.restarted
      self.write(
        "action", part="resume", name="RestartInstance", tier="disk", bytes=0,
        explain=f"restarted on {len(restarted.ranks)} ranks",
        seconds=clock.now() - fresh.began_s,
        outcome="stored" if restarted.cache else "compiled",
      )  # fmt: skip
      self.write("resumed", epoch=view.epoch, paused=fresh.paused)
      return
    start_s = clock.now()
    if not view.disaggregated:  # else no program belongs to a mesh
      backend.background.want(view.launched, standing.ready)
    if self._case.wait_ready:
      backend.wait_ready()
    self.write(
      "prepare", seconds=clock.now() - start_s,
      redundancy_bytes=reserve_bytes(
        view, backend.memory(), self._case.rows, self._case.row_bytes
      ),
      ready_meshes=len(standing.ready), checkpoint=standing.checkpoint,
      spares=self._case.policy.spares,
    )  # fmt: skip

  def _successor(
    self, restart: EngineRestart, backend: SimulatedBackend, generation: int
  ) -> _Fresh:
    """What the next engine must know; every request is prefilled by it."""
    view = backend.view()
    dead = (view.status == rm.Status.LOST).nonzero()[0].tolist()
    action = restart.action
    began_s = self._clock.now()
    begun = {
      n: a for n, a in self.answers.items() if a.tokens and not a.reason
    }
    self.write(
      "requests_moved", kind="recompute", request_ids=sorted(begun), bytes=0,
      tokens=sum(
        len(a.request.prompt) + len(a.tokens) - 1 for a in begun.values()
      ),
    )  # fmt: skip
    self._intake.restart(a for a in self.answers.values() if not a.reason)
    return _Fresh(
      Restarted(action.ranks, tuple(dead), view.epoch, action.cache),
      generation + 1, self._next_step, began_s,
      sorted(restart.state.sequences),
    )  # fmt: skip

  def outputs(self) -> list[dict[str, Any]]:
    """One object a request (DESIGN section 8)."""
    return [
      {
        "request_id": name,
        "prompt_tokens": list(a.request.prompt),
        "output_tokens": a.tokens,
        "finish_reason": a.reason,
      }
      for name, a in self.answers.items()
    ]


class _Intake:
  """Requests on their way to the engine (`serving.loop.Intake`)."""

  def __init__(self, run: Run) -> None:
    self._run = run
    self._waiting: list[Answer] = []
    self.again: list[Request] = []  # that clients are about to send again

  def send(self, answer: Answer) -> None:
    self._waiting.append(answer)

  def restart(self, answers: Any) -> None:
    """A fresh engine is handed everything that is unanswered."""
    self._waiting = list(answers)

  def poll(self, step: int) -> list[tuple[Request, tuple[int, ...]]]:
    while self.again:
      self._run._accept(self.again.pop(0))
    due = [a for a in self._waiting if (a.request.arrival_step or 0) <= step]
    if due:
      self._waiting = [a for a in self._waiting if a not in due]
    return [(a.request, tuple(a.tokens)) for a in due]

  def next_step(self) -> int | None:
    steps = [a.request.arrival_step or 0 for a in self._waiting]
    return min(steps, default=None)

  def closed(self) -> bool:
    return not self._waiting and self._run.closed()


def bare_view(case: SimulatedCase) -> rm.ClusterView:
  """What the policy prepares on."""
  model = case.model
  return rm.bare_view(
    case.ranks, model.n_experts, spares=case.policy.spares,
    top_k=model.top_k, rows_per_rank=case.rows,
    expert_bytes=model.expert_bytes, token_kv_bytes=model.token_kv_bytes,
    attention=case.attention,
  )  # fmt: skip

