"""Shadow experts, KV from the checkpoint store, replacements in the background.

Keeps standing: a shadow of `shadows` experts (a number, or memory as "1.5GB"
or "25%"; the most loaded first by `load`) on another expert rank, of another
host or rack where there are several, which holds weights and serves nothing;
the KV of every request in a store process; slots and rows for `losses` ranks;
all experts in host memory (`host_weights`).
Promises: an expert rank's loss is healed by attention ranks that send the same
embeddings to the shadows, before this policy is asked; the plan then makes the
table official. An attention rank's requests go on elsewhere from the last
committed token. Replacements start behind traffic (`replace`). Lossless.
After: Tarragon (arXiv 2601.01310). Kept: separate failure domains, the
versioned routing table, self-healing on both sides, incremental checkpoints
with commit records, restoring request by request, background provisioning.
Not kept: RDMA and its one-sided writes (sockets here), and an expert that has
neither shadow nor replica is copied (nearest tier) instead of waited for.
"""

from collections.abc import Sequence

from resilient_moe.recovery import DEPLOYMENTS, RecoveryPolicy, axes


def make(
  shadows: int | str = "all",
  load: Sequence[float] | None = None,
  losses: int = 1,
  host_weights: bool = True,
  replace: bool = True,
  drain_stragglers: bool = False,
) -> RecoveryPolicy:
  """Survivors and replacements, shadows, KV from the store."""
  return axes.compose(
    "tarragon",
    axes.survivors(losses, replace=replace),
    axes.replicas(shadows, shadows=True, load=load, host_weights=host_weights),
    axes.restore_kv("host"),
    drain_stragglers=drain_stragglers,
    deployments=DEPLOYMENTS[1:],
  )
