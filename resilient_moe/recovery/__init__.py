"""What a policy sees and says, and what it means. NumPy only.

`view` and `failures` are what a policy sees, `actions` and `plan` what it
says, `semantics` what that does to the world, `price` what it costs, `explain`
how it reads. `axes` makes whole policies of three choices.
"""

from resilient_moe.recovery import axes
from resilient_moe.recovery.actions import (
  ACTIONS,
  Action,
  CopyExperts,
  FailRequests,
  Fence,
  FetchExecutable,
  LaunchRank,
  MaskExperts,
  Move,
  RebuildMesh,
  RecomputePrefix,
  Rejoin,
  RemapExperts,
  Requeue,
  RestartInstance,
  RestoreKV,
  SwitchRole,
  Verify,
)
from resilient_moe.recovery.checks import IllegalPlan
from resilient_moe.recovery.combine import cheapest, first_feasible
from resilient_moe.recovery.compose import compose
from resilient_moe.recovery.explain import explain, explain_plan
from resilient_moe.recovery.failures import (
  Failure,
  LinkLost,
  RanksLeaving,
  RanksLost,
  Straggler,
)
from resilient_moe.recovery.packing import routing_table
from resilient_moe.recovery.placement import place
from resilient_moe.recovery.plan import Plan, check, ordered
from resilient_moe.recovery.policy import (
  DEPLOYMENTS,
  Infeasible,
  RecoveryPolicy,
  Standing,
  load,
  misplaced,
  policy_names,
  recover_checked,
)
from resilient_moe.recovery.price import (
  THIS_MACHINE,
  Cost,
  Hardware,
  PlanPrice,
  price,
  price_plan,
)
from resilient_moe.recovery.rescue import (
  assign,
  copies_from,
  lost_experts,
  nearest_tier,
  replicate,
  retable,
  spread_requests,
)
from resilient_moe.recovery.semantics import (
  advance,
  advance_all,
  lose,
  plannable,
  servable,
)
from resilient_moe.recovery.start import (
  bare_view,
  big_view,
  stand,
  start,
  with_requests,
)
from resilient_moe.recovery.view import (
  ClusterView,
  RequestTable,
  Role,
  RoutingTable,
  Status,
  Tier,
  absent,
  mesh_named,
  no_requests,
)

__all__ = [
  "ACTIONS",
  "Action",
  "ClusterView",
  "CopyExperts",
  "DEPLOYMENTS",
  "Cost",
  "FailRequests",
  "Failure",
  "Fence",
  "FetchExecutable",
  "Hardware",
  "IllegalPlan",
  "Infeasible",
  "LaunchRank",
  "LinkLost",
  "MaskExperts",
  "Move",
  "Plan",
  "PlanPrice",
  "RanksLeaving",
  "RanksLost",
  "RebuildMesh",
  "RecomputePrefix",
  "RecoveryPolicy",
  "Rejoin",
  "RemapExperts",
  "RequestTable",
  "Requeue",
  "RestartInstance",
  "RestoreKV",
  "Role",
  "RoutingTable",
  "Standing",
  "Status",
  "Straggler",
  "SwitchRole",
  "THIS_MACHINE",
  "Tier",
  "Verify",
  "absent",
  "advance",
  "advance_all",
  "assign",
  "axes",
  "bare_view",
  "big_view",
  "cheapest",
  "check",
  "compose",
  "copies_from",
  "explain",
  "explain_plan",
  "first_feasible",
  "load",
  "lose",
  "lost_experts",
  "mesh_named",
  "misplaced",
  "nearest_tier",
  "no_requests",
  "ordered",
  "place",
  "plannable",
  "policy_names",
  "price",
  "price_plan",
  "recover_checked",
  "replicate",
  "retable",
  "routing_table",
  "servable",
  "spread_requests",
  "stand",
  "start",
  "with_requests",
]
