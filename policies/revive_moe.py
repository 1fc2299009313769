"""ReviveMoE's decision flow: redundant experts, else mask, else switch a role.

Keeps standing: a second copy of `replicas` experts, slots and rows for
`losses` ranks, ready meshes of every single loss; weights on disk only.
Promises: (1) if every lost expert has a replica, the table changes; (2) else,
with at least `mask_from` expert ranks, the lost ones are masked (lossy) and
come back behind traffic; (3) else, where attention and experts are apart, an
attention rank takes the lost rank's place and reads its experts from disk;
(4) else a cached restart. `mask_from=0` never masks, and is lossless.
Redundancy comes back behind traffic as far as there is room.
After: ReviveMoE (arXiv 2602.21140), section on weight integrity. Kept: the
order of the choices, partial recompute (prefill over prompt and tokens so
far), programs made ready in peacetime, a failed step that changes nothing. Not
kept: fault codes of the device plug-in (detection is the runtime's own), XCCL;
the role switch behind traffic for experts that stay masked because no slot is
free: a plan names who is handed over when it is made, and behind traffic
requests end and are admitted meanwhile. They come back with `replace`.
"""

from resilient_moe.recovery import RecoveryPolicy, axes, first_feasible


def make(
  replicas: int | str = "all",
  losses: int = 1,
  mask_from: int = 0,
  min_live: int = 0,
  replace: bool = False,
) -> RecoveryPolicy:
  """The flow, with the paper's threshold as `mask_from=32`."""
  stay = axes.survivors(losses, replace=replace)
  on_disk = axes.nearest(host_weights=False)
  choices = [
    axes.compose(
      "redundant", stay,
      axes.replicas(replicas, host_weights=False, copy_lost=False),
      axes.re_prefill(),
    )
  ]  # fmt: skip
  if mask_from:
    hide = axes.mask(min_live, host_weights=False, min_ranks=mask_from)
    choices.append(axes.compose("mask", stay, hide, axes.re_prefill()))
  switch = axes.role_switch(losses, replace)
  choices.append(
    axes.compose(
      "switch", switch,
      axes.replicas(replicas, host_weights=False),
      axes.re_prefill(),
    )
  )  # fmt: skip
  again = axes.restart(cache=True, losses=losses)
  choices.append(axes.compose("restart", again, on_disk, axes.re_prefill()))
  return first_feasible(*choices, name="revive_moe")
