"""Memory and failures of a fleet before it is bought.

  python -m experiments.plan --config=configs/plan.py
  python -m experiments.plan --config=configs/plan.py \
      --config.model=mixtral-8x7b --config.ranks=16 --config.attention=8 \
      --config.device_memory_gb=141 --config.losses=1

DeepSeek-V3 on 320 ranks (the decode deployment that its report describes), in
bfloat16 on devices of 80 GB. Takes seconds and allocates nothing.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """DeepSeek-V3 for 320 ranks."""
  config = ml_collections.ConfigDict()
  config.model = "deepseek-v3"  # a preset, or a folder with a config.json
  config.dtype = "bfloat16"
  config.ranks = 320
  config.attention = 0  # of them, ranks that only attend; 0: all do both
  config.device_memory_gb = 80.0
  config.working_gb = 8.0  # of it for programs, activations, link buffers
  config.context = 8192
  config.rows = 16  # sequences that a rank serves at once
  config.chunk = 512  # prompt tokens of a step
  config.losses = 1  # ranks whose experts and requests the others take in
  config.ranks_per_host = 8
  config.hosts_per_rack = 4
  config.asked = 8  # failures of each kind that a policy is asked about
  # Where lost experts come from: policies and their arguments. "fit": as many
  # copies as there is room for.
  config.axes = {
    "replicas": {"policy": "replica_promotion", "replicas": "fit"},
    "shadows on peers": {
      "policy": "replica_promotion",
      "replicas": "fit",
      "shadows": True,
    },
    "host memory": {"policy": "mesh_shrink"},
    "disk": {"policy": "mesh_shrink", "host_weights": False},
    "masked": {"policy": "mask_experts"},
    "role switch": {"policy": "role_switch"},
    "spare": {"policy": "spare", "spares": 1},
    "restart": {"policy": "restart_cached"},
  }
  return config
