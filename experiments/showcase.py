"""One request's text before and after the fault, for people to read."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from experiments.cases import TWIN
from experiments.progress import ranks_of
from resilient_moe import report
from resilient_moe.report.exactness import finished_sequences
from resilient_moe.serving.workload import decode

PREFERRED = ("kv_restore", "replica_promotion", "mesh_shrink")
WIDTH = 76
PROMPT_SHOWN = 160  # characters of the prompt's end


class Example(NamedTuple):
  """An affected answer, and whether the fault-free run gives the same."""

  policy: str
  fault: str
  text: report.BeforeAndAfter
  same: bool


def example(workdir: pathlib.Path, scenario: str, seed: int) -> Example | None:
  """An answer that a fault hit in mid-sentence; None if no run has one."""
  runs = {
    run.policy: run
    for run in report.read_runs(workdir)
    if (run.scenario, run.seed) == (scenario, str(seed)) and run.valid
  }
  twin = runs.pop(TWIN, None)
  first = [name for name in PREFERRED if name in runs]
  for policy in dict.fromkeys([*first, *runs]):
    events = runs[policy].events
    whole = finished_sequences(events)
    hit = [r for r in report.affected_requests(events) if r in whole]
    if hit and twin is not None:
      text = report.before_and_after(events, decode, hit[0])
      fault = next(event for event in events if event["event"] == "fault")
      same = finished_sequences(twin.events).get(hit[0]) == whole[hit[0]]
      return Example(policy, ranks_of(fault), text, same)
  return None


def show(found: Example) -> str:
  """The example as text for a terminal."""
  prompt = found.text.prompt
  if len(prompt) > PROMPT_SHOWN:
    prompt = "... " + prompt[-PROMPT_SHOWN:]
  same = "yes" if found.same else "no"
  return "\n".join([
    f"Request {found.text.request_id} under {found.policy}, which lost its"
    f" {found.fault} in mid-sentence:",
    *_block("prompt", prompt),
    *_block("before the fault", found.text.before),
    *_block("after the fault", found.text.after),
    f"The fault-free run gives the same text: {same}",
  ])  # fmt: skip


def _block(title: str, text: str) -> Sequence[str]:
  """Lines with a bar in front; the text's own line breaks are kept."""
  lines = [f"  {title}"]
  for line in text.split("\n"):
    # Not `textwrap.wrap`, which would drop the blanks at the ends: a cut in
    # mid-word must look like one.
    parts = [line[i : i + WIDTH] for i in range(0, len(line), WIDTH)]
    lines += textwrap.indent("\n".join(parts) or " ", "  | ").split("\n")
  return lines
