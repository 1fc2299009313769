"""A standing spare takes the lost rank's place in the mesh.

Keeps standing: `spares` whole devices that serve nothing, the ready meshes in
which the first of them stands in for each rank, all experts in host memory
(`host_weights`). No slots or rows in reserve: the mesh keeps its size.
Promises: survives as many losses as there are spares; then `Infeasible`.
Lossless.
After: operators' practice (hot spares).
"""

from resilient_moe.recovery import RecoveryPolicy, axes


def make(
  spares: int = 1,
  ready: str = "singles",
  host_weights: bool = True,
  drain_stragglers: bool = False,
  rearm: bool = False,
) -> RecoveryPolicy:
  """A spare, nearest tier, prefill again."""
  return axes.compose(
    "spare",
    axes.spare(spares, ready),
    axes.nearest(host_weights),
    axes.re_prefill(),
    drain_stragglers=drain_stragglers,
    rearm=rearm,
  )
