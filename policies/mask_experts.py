"""Lost experts are hidden from the gate at once, and come back later.

Keeps standing: slots and rows for `losses` ranks, ready meshes of every single
loss, all experts in host memory (`host_weights`).
Promises: goes on without any copy while at least `min_live` experts (never
fewer than a token needs) are left; they are copied back behind traffic, then
unmasked. LOSSY: tokens emitted meanwhile may differ from the fault-free ones.
After: ReviveMoE's missing experts (it asks for 32 ranks or more: `min_live`).
"""

from resilient_moe.recovery import RecoveryPolicy, axes


def make(
  min_live: int = 0,
  losses: int = 1,
  ready: str = "singles",
  host_weights: bool = True,
  replace: bool = False,
  drain_stragglers: bool = False,
  rearm: bool = False,
) -> RecoveryPolicy:
  """Survivors, masked experts, prefill again."""
  return axes.compose(
    "mask_experts",
    axes.survivors(losses, ready, replace),
    axes.mask(min_live, host_weights),
    axes.re_prefill(),
    drain_stragglers=drain_stragglers,
    rearm=rearm,
  )
