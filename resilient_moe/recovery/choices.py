"""What a choice on each of the three axes is made of (`axes.py`)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.policy import DEPLOYMENTS, Infeasible
from resilient_moe.recovery.view import ClusterView

Actions = tuple[act.Action, ...]


class Reserve(NamedTuple):
  """What the ranks axis keeps for the losses it promises to survive."""

  lost_expert_ranks: int  # how many fewer ranks the experts must fit on
  lost_request_ranks: int  # the same for the rows of the requests
  ready: tuple[frozenset[int], ...]  # meshes to make ready


Leaving = tuple[int, ...]


def no_switch(view: ClusterView, leaving: Leaving) -> Actions:
  """Everybody keeps the role that it has."""
  del view, leaving
  return ()


class Ranks(NamedTuple):
  """Who serves, from the left-over view and the ranks that leave.

  `switch` comes first: role switches; `mesh` sees the view after them.
  """

  reserve: Callable[[ClusterView], Reserve]
  mesh: Callable[[ClusterView, Leaving], np.ndarray | Infeasible]
  switch: Callable[[ClusterView, Leaving], Actions] = no_switch
  spares: int = 0
  restart: bool = False  # the plan is one RestartInstance
  cache: bool = False  # executables are kept on disk
  replace: bool = False  # launch a replacement behind traffic
  deployments: tuple[str, ...] = DEPLOYMENTS


def nothing(view: ClusterView) -> Actions:
  """No action."""
  del view
  return ()


class Experts(NamedTuple):
  """Where experts come from: actions on the view with its new mesh.

  `repair` gets the view after `resume`, with those who leave fenced.
  """

  extra: Callable[[ClusterView], int]  # copies kept beside the first ones
  resume: Callable[[ClusterView], Actions | Infeasible]
  repair: Callable[[ClusterView], Actions] = nothing
  copies: int = 1  # table entries an expert
  load: np.ndarray | None = None  # [E] who gets an extra copy first
  host_weights: bool = False
  lossless: bool = True


class Requests(NamedTuple):
  """How displaced requests go on: actions on the view with its new mesh."""

  plan: Callable[[ClusterView], Actions]
  checkpoint: str = "none"
  fails_requests: bool = False
