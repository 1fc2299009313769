"""The three choices of a recovery (DESIGN section 5), as small functions.

- ranks: who serves next: `survivors`, `spare`, `role_switch`, `restart`;
- experts: where lost weights come from: `nearest`, `replicas`, `mask`;
- requests: how they go on: `re_prefill`, `restore_kv`, `fail`.

`compose` makes a policy of one choice on each; a comparison varies one axis at
a time.
"""

from resilient_moe.recovery.compose import compose
from resilient_moe.recovery.experts_axis import mask, nearest, replicas
from resilient_moe.recovery.ranks_axis import (
  restart,
  role_switch,
  spare,
  survivors,
)
from resilient_moe.recovery.requests_axis import fail, re_prefill, restore_kv

__all__ = [
  "compose",
  "fail",
  "mask",
  "nearest",
  "re_prefill",
  "replicas",
  "restart",
  "restore_kv",
  "role_switch",
  "spare",
  "survivors",
]
