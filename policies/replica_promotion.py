"""Replicas take over by a change of the routing table, with no copy before it.

Keeps standing: a second copy of `replicas` experts (a number, or memory as
"1.5GB" or "25%"; the most loaded first by `load`) on another rank (another
host or rack where there are several), serving or (`shadows`) idle; slots and
rows for `losses` ranks, ready meshes of every single loss, all experts in host
memory (`host_weights`) for those that lose every copy.
Promises: as `mesh_shrink`, without its copies for experts that have a replica;
redundancy is restored behind traffic. Lossless.
After: ReviveMoE's redundant experts, Tarragon's shadows, EEP.
"""

from collections.abc import Sequence

from resilient_moe.recovery import RecoveryPolicy, axes


def make(
  replicas: int | str = "all",
  shadows: bool = False,
  load: Sequence[float] | None = None,
  losses: int = 1,
  ready: str = "singles",
  host_weights: bool = True,
  replace: bool = False,
  drain_stragglers: bool = False,
  rearm: bool = False,
) -> RecoveryPolicy:
  """Survivors, replicas else the nearest tier, prefill again."""
  return axes.compose(
    "replica_promotion",
    axes.survivors(losses, ready, replace),
    axes.replicas(replicas, shadows, load, host_weights),
    axes.re_prefill(),
    drain_stragglers=drain_stragglers,
    rearm=rearm,
  )
