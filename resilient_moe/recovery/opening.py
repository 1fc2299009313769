"""The view that an engine opens with: the first one's, or a restarted one's."""

import dataclasses
from typing import NamedTuple

from resilient_moe.recovery.actions import RestartInstance
from resilient_moe.recovery.effects import lose
from resilient_moe.recovery.policy import Standing
from resilient_moe.recovery.semantics import advance
from resilient_moe.recovery.start import stand
from resilient_moe.recovery.view import ClusterView


class Restarted(NamedTuple):
  """What an engine takes over from the one before it."""

  ranks: tuple[int, ...]  # the mesh after the restart
  dead: tuple[int, ...]
  epoch: int  # of the engine before
  cache: bool  # whether its executables were stored


def opening(
  bare: ClusterView, standing: Standing, restarted: Restarted | None = None
) -> ClusterView:
  """What is so before the first request: only what has really run is ready.

  Args:
    bare: of `bare_view`.
    standing: what the policy keeps.
    restarted: None for the first engine of a run.
  """
  view = stand(bare, standing)
  own: frozenset[int] | None = None
  if restarted is not None:
    view = lose(view, restarted.dead)
    view = advance(view, RestartInstance(restarted.ranks, restarted.cache))
    view = dataclasses.replace(view, epoch=restarted.epoch + 1)
    own = view.executable
  own = own or frozenset()
  return dataclasses.replace(
    view, ready=frozenset({own}), cached=frozenset(), executable=own
  )
