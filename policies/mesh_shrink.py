"""The survivors close up and go on; lost experts come from the nearest tier.

Keeps standing: slots and rows for `losses` ranks, ready meshes of every single
loss, all experts in host memory (`host_weights`).
Promises: survives losses as long as the survivors' slots hold every expert;
rows that don't fit wait in the queue. Lossless.
After: ReviveMoE, with host memory where it reads from disk.
"""

from resilient_moe.recovery import RecoveryPolicy, axes


def make(
  losses: int = 1,
  ready: str = "singles",
  host_weights: bool = True,
  replace: bool = False,
  drain_stragglers: bool = False,
  rearm: bool = False,
) -> RecoveryPolicy:
  """Survivors, nearest tier, prefill again."""
  return axes.compose(
    "mesh_shrink",
    axes.survivors(losses, ready, replace),
    axes.nearest(host_weights),
    axes.re_prefill(),
    drain_stragglers=drain_stragglers,
    rearm=rearm,
  )
