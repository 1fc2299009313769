"""`kv_restore` whose checkpoints are the host's, not a neighbour's.

Keeps standing: what `kv_restore` does, with the KV of every request streamed
to the host: a store process of its own where ranks are processes.
Promises: the same; a rank lost together with its neighbour is restored too.
After: Tarragon's checkpoint store.
"""

import dataclasses
from typing import Any

from policies import kv_restore
from resilient_moe.recovery import RecoveryPolicy


def make(**kwargs: Any) -> RecoveryPolicy:
  """As `kv_restore`, whose keywords it takes but for `checkpoint`."""
  policy = kv_restore.make(checkpoint="host", **kwargs)
  return dataclasses.replace(policy, name="kv_restore_host")
