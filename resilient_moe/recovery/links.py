"""A link between an attention rank and an expert rank, lost while both live.

The attention rank has healed already what it could: it sends to other copies.
What is left to decide is whether that is enough.
"""

import numpy as np

from resilient_moe.recovery.checks import expert_ranks
from resilient_moe.recovery.failures import LinkLost
from resilient_moe.recovery.view import ClusterView


def needed(view: ClusterView, failure: LinkLost) -> bool:
  """Whether something has to be done: the attention rank can't go on."""
  if failure.elsewhere is not None:
    return not failure.elsewhere
  return len(cut_off(view, failure)) > 0


def cut_off(view: ClusterView, failure: LinkLost) -> np.ndarray:
  """Experts that only the rank behind the link holds, [.] int64."""
  others = np.setdiff1d(expert_ranks(view), [failure.expert])
  others = others[view.alive()[others]]
  held = np.unique(view.slots[others])
  mine = np.unique(view.slots[failure.expert])
  return np.setdiff1d(mine[mine >= 0], held)
