"""Serve a sharded mixture-of-experts model, break it, recover it, compare.

The public door. It is lazy: a name is imported when it is first asked for, so
that host-only users (policies, the simulator, reports) never load JAX.

  import resilient_moe as rm
  config, params = rm.load_checkpoint(path)  # or rm.load_huggingface(path)
  logits = rm.forward(config, params, tokens)
  outputs = rm.generate(config, params, prompts, ranks=8, policy="kv_restore")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from resilient_moe.model import (
    ModelConfig,
    forward,
    init_params,
    load_checkpoint,
    save_checkpoint,
  )
  from resilient_moe.recovery import (
    ACTIONS,
    Action,
    ClusterView,
    CopyExperts,
    FailRequests,
    Failure,
    Fence,
    FetchExecutable,
    Infeasible,
    LaunchRank,
    MaskExperts,
    Move,
    Plan,
    RanksLeaving,
    RanksLost,
    RebuildMesh,
    RecomputePrefix,
    RecoveryPolicy,
    Rejoin,
    RemapExperts,
    Requeue,
    RestartInstance,
    RestoreKV,
    Role,
    RoutingTable,
    Standing,
    Status,
    Straggler,
    SwitchRole,
    Tier,
    Verify,
    cheapest,
    compose,
    first_feasible,
  )
  from resilient_moe.runtime.generate import generate
  from third_party.huggingface import (
    Tokenizer,
    load_huggingface,
    save_huggingface,
  )

__version__ = "0.1.0"

__all__ = [
  "ACTIONS",
  "Action",
  "ClusterView",
  "CopyExperts",
  "FailRequests",
  "Failure",
  "Fence",
  "FetchExecutable",
  "Infeasible",
  "LaunchRank",
  "MaskExperts",
  "ModelConfig",
  "Move",
  "Plan",
  "RanksLeaving",
  "RanksLost",
  "RebuildMesh",
  "RecomputePrefix",
  "RecoveryPolicy",
  "Rejoin",
  "RemapExperts",
  "Requeue",
  "RestartInstance",
  "RestoreKV",
  "Role",
  "RoutingTable",
  "Standing",
  "Status",
  "Straggler",
  "SwitchRole",
  "Tier",
  "Tokenizer",
  "Verify",
  "cheapest",
  "compose",
  "first_feasible",
  "forward",
  "generate",
  "init_params",
  "load_checkpoint",
  "load_huggingface",
  "save_checkpoint",
  "save_huggingface",
]

# Where a name lives; what is not listed comes from the recovery core.
_ELSEWHERE = {
  "Tokenizer": "third_party.huggingface",
  "ModelConfig": "resilient_moe.model",
  "forward": "resilient_moe.model",
  "generate": "resilient_moe.runtime.generate",
  "init_params": "resilient_moe.model",
  "load_checkpoint": "resilient_moe.model",
  "load_huggingface": "third_party.huggingface",
  "save_checkpoint": "resilient_moe.model",
  "save_huggingface": "third_party.huggingface",
}


def __getattr__(name: str) -> object:
  """Imports a public name on first use (PEP 562)."""
  if name not in __all__:
    raise AttributeError(
      f"module {__name__!r} has no attribute {name!r}; "
      f"it offers {', '.join(__all__)}"
    )
  module = importlib.import_module(
    _ELSEWHERE.get(name, "resilient_moe.recovery")
  )
  value = getattr(module, name)
  globals()[name] = value  # the next lookup costs nothing
  return value


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
