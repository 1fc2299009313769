"""A stand-in for the gateway: writes the history that a run would leave.

Tokens are a function of (request seed, position), whatever the policy, so all
runs of a case agree; one rank's requests (those with an even index) are hit by
the fault, and everybody goes on one step later.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections

from resilient_moe.report import History
from resilient_moe.runtime.case import Case, RunFailed, make_policy

STEP_S = 0.05
TINY: dict[str, Any] = {
  "ranks": 4,
  "options": {"rows": 2, "max_len": 64, "chunk": 16, "kv_block": 16},
  "workload": {"count": 4, "prompt_tokens": (8, 16), "new_tokens": (8, 8)},
  "scenarios": "rank_lost_decode",
  "fault_step": 3,
  "policies": "mesh_shrink,kv_restore",
  "seeds": "0",
}


def model_folder(folder: pathlib.Path) -> str:
  """A checkpoint that passes the launcher's checks and holds no weights."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text("{}")
  (folder / "manifest.json").write_text("{}")
  return str(folder)


def config_file(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
  """A config file, as a user would write one."""
  fields = tiny(folder, **changes).to_dict()
  file = folder / "config.py"
  file.write_text(
    "import ml_collections\n\n\ndef get_config():\n"
    f"  return ml_collections.ConfigDict({fields!r})\n"
  )
  return file


def tiny(folder: pathlib.Path, **changes: Any) -> ml_collections.ConfigDict:
  """The same config as a value; tables are changed, not replaced."""
  model = folder / "model"
  checkpoint = str(model) if model.exists() else model_folder(model)
  fields = {"checkpoint": checkpoint, **TINY}
  for name, value in changes.items():
    both = isinstance(value, dict) and isinstance(fields.get(name), dict)
    fields[name] = {**fields[name], **value} if both else value
  return ml_collections.ConfigDict(fields)


class FakeGateway:
  """Callable as `run_case`; `fails` names policies that can't recover."""

  def __init__(self) -> None:
    self.ran: list[tuple[str, str, int]] = []
    self.fails: set[str] = set()
    self.interrupt: str = ""
    self.wrong: str = ""  # a policy that gives another text

  def __call__(
    self,
    case: Case,
    folder: pathlib.Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
  ) -> None:
    self.ran.append((case.scenario, case.policy, case.seed))
    if case.policy == self.interrupt:
      (folder / "history.jsonl.partial").write_text('{"event": "ru')
      raise KeyboardInterrupt
    events = History(lambda: 0.0)
    _serve(case, events, case.policy == self.wrong)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    if case.policy in self.fails:
      head = "".join(lines.splitlines(keepends=True)[:7])
      (folder / "history.jsonl.partial").write_text(head + '{"event": "st')
      raise RunFailed(f"policy {case.policy!r} can't recover")
    for event in events:
      if progress is not None:
        progress(event)
    (folder / "history.jsonl").write_text(lines)
    (folder / "outputs.jsonl").write_text("{}\n" * len(case.requests))


def _serve(case: Case, events: History, wrong: bool) -> None:
  policy = make_policy(case)
  events.write(
    "run", 0.0, policy=case.policy, scenario=case.scenario,
    runtime=case.runtime, deployment=case.deployment, seed=case.seed,
    ranks=case.ranks, lossless=policy.lossless, exact=True,
    fails_requests=policy.fails_requests, expected_faults=len(case.faults),
  )  # fmt: skip
  mesh = list(range(case.ranks))
  events.write("epoch", 0.0, epoch=0, mesh=mesh)
  for r in case.requests:
    events.write("accepted", 0.0, request_id=r.request_id,
                 prompt_tokens=r.prompt,
                 max_new_tokens=r.max_new_tokens)  # fmt: skip
  now_s, epoch = 0.0, 0
  for step in range(max(r.max_new_tokens for r in case.requests)):
    if case.faults and step == case.faults[0].at_step:
      now_s, epoch = now_s + STEP_S, 1
      _recover(case, events, step, now_s)
    now_s += STEP_S
    emitted = [
      [r.request_id, len(r.prompt) + step, 97 + (r.seed + step + wrong) % 26]
      for r in case.requests
    ]
    events.write("step", now_s, step=step, epoch=epoch, bucket=0,
                 seconds=STEP_S, prefill_tokens=0, emitted=emitted)  # fmt: skip
  for r in case.requests:
    events.write("finished", now_s, request_id=r.request_id, reason="length",
                 tokens=r.max_new_tokens)  # fmt: skip
  events.write("end", now_s)


def _recover(case: Case, events: History, step: int, now_s: float) -> None:
  ranks = case.faults[0].ranks
  affected = [r.request_id for r in case.requests[::2]]
  everybody = [r.request_id for r in case.requests]
  events.write("fault", now_s, kind="rank_lost", ranks=ranks, phase="decode",
               step=step, affected=affected)  # fmt: skip
  events.write("failure", now_s, kind="RanksLost", ranks=ranks, epoch=0)
  events.write("plan", now_s, policy=case.policy, epoch=0, resume=["shrink"],
               repair=[], paused=everybody, seconds=0.001)  # fmt: skip
  survivors = [r for r in range(case.ranks) if r not in ranks]
  events.write("epoch", now_s, epoch=1, mesh=survivors)
  events.write("resumed", now_s, epoch=1, paused=everybody)
  events.write("redundancy", now_s, full=True, epoch=1)
