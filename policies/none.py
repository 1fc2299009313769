"""The fault-free twin: recovers from nothing.

Keeps standing: every expert once, nothing else.
Promises: nothing; every failure is `Infeasible`. Lossless (it changes no
token, since nothing goes on).
After: the run that the others are compared with.
"""

from resilient_moe.recovery import (
  ClusterView,
  Failure,
  Infeasible,
  RecoveryPolicy,
  axes,
)


def make() -> RecoveryPolicy:
  """A policy that never recovers."""
  bare = axes.compose(
    "none",
    axes.survivors(losses=0, ready="none"),
    axes.nearest(host_weights=False),
    axes.re_prefill(),
  )

  def recover(view: ClusterView, failure: Failure) -> Infeasible:
    del view
    return Infeasible(f"`none` recovers from nothing, not from {failure}")

  return RecoveryPolicy("none", bare.prepare, recover)
