"""Watches a run's actions: is the world what `advance` says it should be?"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from resilient_moe import recovery as rm
from resilient_moe.serving import recover
from resilient_moe.serving.backend import Backend, Outcome
from resilient_moe.serving.carry import Record
from resilient_moe.serving.state import (
  Current,
  SchedulerState,
  request_table,
)


def world(backend: Backend, state: SchedulerState) -> rm.ClusterView:
  """The view as a policy would get it now."""
  table = request_table(state, backend.checkpoints())
  return dataclasses.replace(backend.view(), requests=table)


def differences(real: Any, said: Any, path: str = "") -> list[str]:
  """Where two views (or parts of them) differ, in words."""
  if dataclasses.is_dataclass(real):
    return [
      line
      for f in dataclasses.fields(real)
      for line in differences(
        getattr(real, f.name), getattr(said, f.name), f"{path}.{f.name}"
      )
    ]
  same = np.array_equal(real, said)
  if isinstance(real, np.ndarray):
    same = same and real.dtype == said.dtype
  else:
    same = same and real == said
  return [] if same else [f"{path[1:]}: is {real}, advance says {said}"]


class Watch:
  """Every action of the runs under it, and what was not as defined."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
    self.seen: list[str] = []
    self.wrong: list[str] = []
    self._carry_out = recover.carry_out
    monkeypatch.setattr(recover, "carry_out", self._watched)

  def _watched(
    self, action: rm.Action, current: Current, backend: Backend,
    record: Record,
  ) -> Outcome:  # fmt: skip
    name = type(action).__name__
    self.seen.append(name)
    before = world(backend, current.state)
    outcome = self._carry_out(action, current, backend, record)
    said = rm.advance(before, action)
    found = differences(world(backend, current.state), said)
    self.wrong += [f"after {name}: {line}" for line in found]
    return outcome
