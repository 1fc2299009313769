"""Which recovery policy for a fleet, from 64 to 10,240 devices over 30 days.

  python -m experiments.fleet --config=configs/fleet.py --workdir=runs/fleet

DeepSeek-V3 on H200, 64 ranks a group, failures at Meta's RSC-1 rate, load with
the statistics of Azure's conversation trace at 0.6 of a bare group's capacity.
`--config.traces=DIR` takes the real trace instead, `--config.rate=llama3`
another rate (`sim/failure_rates.py` has them, with sources). Expected: 10,240
devices under one policy in at most 60 s on one core.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The study of the paper."""
  config = ml_collections.ConfigDict()
  config.policies = (
    "restart,restart_cached,mesh_shrink,replica_promotion,kv_restore,"
    "kv_restore_host,mask_experts,spare,spare_4,retry,eep,cheapest"
  )
  # Every policy that can brings replacements in, and makes the meshes of the
  # next losses ready behind traffic.
  config.policy_defaults = {"replace": True, "rearm": True}
  # By label, as in --config.policy_kwargs.kv_restore.checkpoint=host; `policy`
  # names the policy of a label that is none.
  config.policy_kwargs = {
    "kv_restore_host": {"replace": True, "rearm": True},
    "spare_4": {"policy": "spare", "spares": 4},
  }
  config.cheapest_of = "kv_restore,replica_promotion,mesh_shrink,restart_cached"
  config.instances = "1,4,16,40,160"
  config.seeds = "0,1,2"
  config.model = "deepseek-v3"
  config.device = "h200"
  config.ranks = 64
  config.attention = 0
  config.days = 30.0
  config.rate = "rsc1"
  config.multiplier = 1.0
  config.repair = {}
  config.stragglers = {}
  config.utilisation = 0.6
  config.trace = "conv"
  config.traces = ""
  config.ttft_slo_s = 5.0
  config.tbt_slo_s = 0.1
  # A rank's chunk goes through its own link to the experts of all layers.
  config.chunk = 128
  config.jobs = 0
  return config
