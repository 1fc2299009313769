"""Whole restart with stored executables: the baseline to beat.

Keeps standing: executables of the full mesh and of every single loss on disk,
slots and rows for `losses` ranks.
Promises: goes on with whoever is left, down to one rank: weights from disk,
programs loaded where they are stored, every request prefilled again. Lossless.
After: ReviveMoE's baseline (cached reinitialisation).
"""

from resilient_moe.recovery import RecoveryPolicy, axes


def make(losses: int = 1, drain_stragglers: bool = False) -> RecoveryPolicy:
  """A restart that loads its programs."""
  return axes.compose(
    "restart_cached",
    axes.restart(cache=True, losses=losses),
    axes.nearest(host_weights=False),
    axes.re_prefill(),
    drain_stragglers=drain_stragglers,
  )
