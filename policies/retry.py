"""The survivors close up; requests of lost ranks fail and the client retries.

Keeps standing: what `mesh_shrink` does.
Promises: survives losses as long as the survivors' slots hold every expert.
Requests on lost ranks end with an error (declared: `fails_requests`); those on
ranks that only leave are handed over. What finishes has its fault-free tokens.
After: EEP's treatment of requests.
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
  """Survivors, nearest tier, failed requests."""
  return axes.compose(
    "retry",
    axes.survivors(losses, ready, replace),
    axes.nearest(host_weights),
    axes.fail(),
    drain_stragglers=drain_stragglers,
    rearm=rearm,
  )
