"""Progress of a run: one live line on a terminal, a few lines elsewhere."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

REDRAW_S = 0.1
HEARTBEAT_S = 20.0  # between lines where a line can't be rewritten


def seconds(value: float) -> str:
  """A duration for people."""
  return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def ranks_of(event: Mapping[str, Any]) -> str:
  """The ranks that an event names, in words."""
  ranks = event["ranks"]
  if not ranks:
    return "no rank"
  noun = "rank" if len(ranks) == 1 else "ranks"
  return f"{noun} {', '.join(map(str, ranks))}"


class Progress:
  """Told every event of one run; says where it stands."""

  def __init__(
    self,
    title: str,
    out: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    self._title = title
    self._out = out or sys.stdout
    self._clock = clock
    self._start_s = self._shown_s = clock()
    self._live = self._out.isatty()
    self._now = "starting"
    self._notes: list[str] = []
    self._steps = 0
    self._fault_t = 0.0
    self._restart: dict[str, float] = {}
    if not self._live:
      self._print(title)

  def __call__(self, event: dict[str, Any]) -> None:
    """Takes an event of the history."""
    take = getattr(self, f"_on_{event['event']}", None)
    if take is not None:
      take(event)
    self._show()

  def close(self, outcome: str) -> None:
    """Ends the line with what came of the run."""
    notes = [f"{self._steps} steps in {seconds(self._elapsed_s())}"]
    notes += self._notes + self._restart_note() + [outcome]
    text = "; ".join(notes)
    if self._live:
      self._print(f"\r\x1b[K{self._title}: {text}")
    else:
      self._print(f"  {text}")

  def _on_engine(self, event: Mapping[str, Any]) -> None:
    self._now = f"engine: {event['stage']}"
    if event["generation"]:
      stage = str(event["stage"])
      spent = self._restart.get(stage, 0.0)
      self._restart[stage] = spent + event["seconds"]

  def _on_mesh_ready(self, event: Mapping[str, Any]) -> None:
    self._now = f"mesh without {event['absent']} ready"

  def _on_step(self, event: Mapping[str, Any]) -> None:
    self._steps += 1
    self._now = f"step {event['step']}"

  def _on_fault(self, event: Mapping[str, Any]) -> None:
    self._fault_t = event["t"]
    kind = str(event["kind"]).replace("_", " ")
    self._note(f"{kind} ({ranks_of(event)}) at step {event['step']}")

  def _on_plan(self, event: Mapping[str, Any]) -> None:
    self._note(f"planned in {seconds(event['seconds'])}")

  def _on_infeasible(self, event: Mapping[str, Any]) -> None:
    self._note(f"{event['policy']} can't: {event['reason']}")

  def _on_resumed(self, event: Mapping[str, Any]) -> None:
    self._note(f"resumed after {seconds(event['t'] - self._fault_t)}")

  def _on_redundancy(self, event: Mapping[str, Any]) -> None:
    # Before a fault it says that what a policy keeps standing stands.
    if event["full"] and self._fault_t:
      after = seconds(event["t"] - self._fault_t)
      self._note(f"redundant again after {after}")

  def _on_warning(self, event: Mapping[str, Any]) -> None:
    self._note(f"warning: {event['text']}")

  def _restart_note(self) -> list[str]:
    """The stages of a restart, which are a baseline's own account."""
    stages = [f"{n} {seconds(s)}" for n, s in self._restart.items()]
    return [f"restart ({', '.join(stages)})"] if stages else []

  def _note(self, text: str) -> None:
    if text not in self._notes:
      self._notes.append(text)
    self._now = text

  def _elapsed_s(self) -> float:
    return self._clock() - self._start_s

  def _show(self) -> None:
    """Redraws the line, or adds one once in a long while."""
    waited_s = self._clock() - self._shown_s
    if waited_s < (REDRAW_S if self._live else HEARTBEAT_S):
      return
    self._shown_s = self._clock()
    text = f"{self._now}, {seconds(self._elapsed_s())}"
    if self._live:
      width = shutil.get_terminal_size().columns - 1
      line = f"{self._title}: {text}"[:width]
      self._out.write(f"\r\x1b[K{line}")
      self._out.flush()
    else:
      self._print(f"  {text}")

  def _print(self, text: str) -> None:
    print(text, file=self._out, flush=True)
