"""An attention rank takes the place of a lost expert rank.

Keeps standing: rows for `losses` attention ranks, all experts in host memory
(`host_weights`; without it they are read from disk, as in the paper). No slots.
Promises: as long as two attention ranks are left, a lost expert rank is
replaced by the one with the fewest requests, unless free slots are left: the
requests are handed over with their KV, and it loads the lost experts. With
`replace` a replacement starts behind traffic, takes the experts, and the rank
attends again. Lossless.
After: ReviveMoE's role switch (disaggregated only). Kept: who switches and
why, the handing over, the experts from disk. Not kept: the rank is not
restarted in its new role (its programs for both roles are there), so what the
paper spends on that is not paid here.
"""

from resilient_moe.recovery import RecoveryPolicy, axes


def make(
  losses: int = 1,
  host_weights: bool = True,
  replace: bool = False,
  drain_stragglers: bool = False,
) -> RecoveryPolicy:
  """A switched role, nearest tier, prefill again where KV is gone."""
  return axes.compose(
    "role_switch",
    axes.role_switch(losses, replace),
    axes.nearest(host_weights),
    axes.re_prefill(),
    drain_stragglers=drain_stragglers,
  )
