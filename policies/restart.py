"""Whole restart, cold: the engine ends, a fresh one serves on.

Keeps standing: slots and rows for `losses` ranks, so that its step has the
shapes of the policies it is compared with; nothing else.
Promises: goes on with whoever is left, down to one rank: weights from disk,
programs compiled, every request prefilled again. Lossless.
After: usual practice.
"""

from resilient_moe.recovery import RecoveryPolicy, axes


def make(losses: int = 1, drain_stragglers: bool = False) -> RecoveryPolicy:
  """A restart that compiles."""
  return axes.compose(
    "restart",
    axes.restart(cache=False, losses=losses),
    axes.nearest(host_weights=False),
    axes.re_prefill(),
    drain_stragglers=drain_stragglers,
  )
