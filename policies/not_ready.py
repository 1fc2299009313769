"""`kv_restore` on a mesh that nobody made ready: what readiness is worth.

Keeps standing: what `kv_restore` does, without ready meshes.
Promises: the same. Its first step after a loss loads the survivors' programs
(or compiles them) and makes their connections while everybody waits.
After: ours, an ablation; a loss that `ready` did not foresee looks like this.
"""

import dataclasses
from typing import Any

from policies import kv_restore
from resilient_moe.recovery import RecoveryPolicy


def make(**kwargs: Any) -> RecoveryPolicy:
  """As `kv_restore`, whose keywords it takes but for `ready`."""
  policy = kv_restore.make(ready="none", **kwargs)
  return dataclasses.replace(policy, name="not_ready")
