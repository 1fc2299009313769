"""Replicas take over, and requests go on from checkpointed KV.

Keeps standing: what `replica_promotion` does, and the KV of every request,
streamed step by step to a neighbour's memory (`checkpoint="peer"`) or to the
host's (`"host"`).
Promises: as `replica_promotion`; only the suffix that the checkpoint had not
reached is prefilled, or everything if the checkpoint died too. Lossless.
After: Tarragon (its self-healing datapath is not part of it).
"""

from resilient_moe.recovery import RecoveryPolicy, axes


def make(
  checkpoint: str = "peer",
  replicas: int | str = "all",
  shadows: bool = False,
  losses: int = 1,
  ready: str = "singles",
  host_weights: bool = True,
  replace: bool = False,
  drain_stragglers: bool = False,
  rearm: bool = False,
) -> RecoveryPolicy:
  """Survivors, replicas else the nearest tier, restored KV."""
  return axes.compose(
    "kv_restore",
    axes.survivors(losses, ready, replace),
    axes.replicas(replicas, shadows, host_weights=host_weights),
    axes.restore_kv(checkpoint),
    drain_stragglers=drain_stragglers,
    rearm=rearm,
  )
