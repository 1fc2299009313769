"""Survivors repair themselves, requests of lost ranks fail, ranks join later.

Keeps standing: slots and rows for `losses` ranks, ready meshes of every single
loss, all experts in host memory; `replicas` extra copies.
Promises: `losses` ranks may be lost, at once or one after the other; lost
experts come from where they are nearest: a copy that is there already, a peer,
host memory. Requests on lost ranks end with an error for the client to retry
(`fails_requests`). Replacements warm up aside and join with a short pause
(`replace`).
After: EEP (arXiv 2605.10670; Mooncake, SGLang Elastic EP). Kept: three tiers
of repair, coverage of all experts before service goes on, deferred join. Not
kept: the peer table inside of the kernel; here another, ready program runs.
"""

from resilient_moe.recovery import DEPLOYMENTS, RecoveryPolicy, axes


def make(
  replicas: int | str = 0,
  losses: int = 1,
  ready: str = "singles",
  replace: bool = True,
  drain_stragglers: bool = False,
  rearm: bool = False,
) -> RecoveryPolicy:
  """Survivors, nearest tier (replicas first), failed requests."""
  return axes.compose(
    "eep",
    axes.survivors(losses, ready, replace),
    axes.replicas(replicas),
    axes.fail(),
    drain_stragglers=drain_stragglers,
    rearm=rearm,
    deployments=DEPLOYMENTS[:1],
  )
