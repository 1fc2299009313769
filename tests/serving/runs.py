"""Whole runs of `serve` over the fake backend, and what must hold of them."""

from typing import Any

from resilient_moe import recovery as rm
from resilient_moe.report import History, verdict
from resilient_moe.report.history import of_kind
from resilient_moe.serving.loop import serve
from resilient_moe.serving.request import Request
from tests.serving import fake

RANKS = 4
POLICIES = {
  "mesh_shrink": {},
  "replica_promotion": {},
  "kv_restore": {},
  "kv_restore-host": {"checkpoint": "host"},
  "retry": {},
}


class Intake:
  """Requests that arrive at their step."""

  def __init__(self, requests, already=None):
    self.waiting = sorted(requests, key=lambda r: r.arrival_step)
    self.already = already or {}

  def poll(self, step):
    here = [r for r in self.waiting if r.arrival_step <= step]
    self.waiting = self.waiting[len(here) :]
    return [(r, self.already.get(r.request_id, ())) for r in here]

  def next_step(self):
    return self.waiting[0].arrival_step if self.waiting else None

  def closed(self):
    return not self.waiting


def some_requests(rng, n: int = 14) -> list[Request]:
  return [
    Request(
      f"r{i:02d}",
      tuple(int(t) for t in rng.integers(0, 50, rng.integers(1, 24))),
      max_new_tokens=int(rng.integers(1, 12)),
      seed=int(rng.integers(100)),
      stop=(7,) if i % 3 == 0 else (),
      arrival_step=int(rng.integers(0, 10)),
    )
    for i in range(n)
  ]


def begun(policy: rm.RecoveryPolicy, requests) -> History:
  """The events that the gateway writes before the engine serves."""
  history = History()
  history.write(
    "run", policy=policy.name, scenario="test", runtime="emulated",
    deployment="collocated", seed=0, ranks=RANKS, lossless=policy.lossless,
    fails_requests=policy.fails_requests, exact=True,
  )  # fmt: skip
  history.write("epoch", epoch=0, mesh=list(range(RANKS)))
  for r in requests:
    history.write(
      "accepted", request_id=r.request_id, prompt_tokens=list(r.prompt),
      max_new_tokens=r.max_new_tokens,
    )  # fmt: skip
  return history


def run(name, requests, losses: int = 1, chunk: int = 5, **faults):
  """Serves until the end: the history and the backend."""
  kwargs: dict[str, Any] = dict(POLICIES.get(name, {}))
  if name != "none":
    kwargs["losses"] = losses
  policy = rm.load(name.split("-")[0], **kwargs)
  view = fake.bare(RANKS)
  backend = fake.FakeBackend(view, policy.prepare(view), **faults)
  history = begun(policy, requests)
  serve(Intake(requests), backend, policy, history.write, chunk=chunk)
  history.write("end")
  return history, backend


def texts(history) -> dict[str, tuple[int, ...]]:
  out: dict[str, tuple[int, ...]] = {}
  for step in of_kind(history, "step"):
    for name, _, token in step["emitted"]:
      out[name] = (*out.get(name, ()), token)
  return out


def check(history, requests, fails: bool = False) -> None:
  """Invariants 1 to 3, without and with the checkers."""
  said = texts(history)
  failed = {e["request_id"] for e in of_kind(history, "failed")}
  finished = [e["request_id"] for e in of_kind(history, "finished")]
  assert fails or not failed
  assert len(finished) == len(set(finished))
  assert set(finished) | failed == {r.request_id for r in requests}
  assert not set(finished) & failed
  for r in requests:
    mine, want = said.get(r.request_id, ()), fake.answer(r)
    if r.request_id in failed:
      assert mine == want[: len(mine)]
    else:
      assert mine == want, r.request_id
  found = verdict(list(history))["checkers"]
  names = {"accounting", "immutability", "epochs_monotone"}
  if failed:  # this intake's clients don't try again
    names.remove("accounting")
  for name in names:
    assert found[name]["value"] in ("true", "not applicable"), found[name]
