"""Processes are killed again and again, under each policy, in one table.

  python -m experiments.campaign --config=configs/campaign.py \
      --workdir=runs/campaign

Four worker processes serve the shipped byte-level MoE; workers (and the store
of KV checkpoints) are killed or stopped at seeded steps: in decode, in
prefill, two at once, with the neighbour that holds a checkpoint, during
another recovery, and one after the other for as long as they come back. The
command can be interrupted and goes on when it is given again; for every case
that is not valid it prints the command that repeats it.

336 kills in 120 cases. Expected: every verdict `true`, no request lost, no
token repeated, none changed and all outputs exact but for `mask_experts`
(which is lossy); about an hour on 2 idle cores, half of it with
`--config.seeds=0`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The campaign of the published table."""
  config = ml_collections.ConfigDict()
  config.checkpoint = "byte_moe"
  config.runtime = "process"
  config.deployment = "collocated"
  config.ranks = 4
  config.options = {"rows": 4, "max_len": 256, "chunk": 32, "kv_block": 32}

  # Prefills come for as long as requests arrive, so that both phases are hit.
  config.workload = {
    "count": 16,
    "prompt_tokens": (16, 64),
    "new_tokens": (64, 120),
    "temperatures": (0.0, 0.0, 0.0, 0.8),
    "arrivals": "steps",
    "rate": 0.25,
  }

  config.scenarios = (
    "killed_twenty_times,rank_lost_decode,rank_lost_prefill,random,"
    "rank_stuck,two_at_once,during_recovery,neighbours,maintenance,"
    "rank_stuck_returns,store_and_rank"
  )
  # A replacement takes seconds: requests must come for long enough.
  config.workloads = {"killed_twenty_times": {"count": 160, "rate": 0.07}}
  config.fault_step = 20
  config.wait_ready = True

  config.policies = (
    "kv_restore,kv_restore_host,replica_promotion,mesh_shrink,mask_experts,"
    "restart_cached"
  )
  # What is lost comes back, and what stands in for it is set up again.
  grown = {"replace": True, "rearm": True}
  config.policy_kwargs = {
    "kv_restore": grown,
    "kv_restore_host": grown,
    "replica_promotion": grown,
    # Slots for the losses of two ranks: it has no replicas to fall back on.
    "mesh_shrink": {**grown, "losses": 2},
    "mask_experts": grown,
    "restart_cached": {"losses": 2},
  }
  # A restart goes on with whoever is left: after some kills that is nobody.
  config.leave_out = ",".join(
    ["killed_twenty_times/restart_cached"]
    # Only one of them has a store to lose.
    + [
      f"store_and_rank/{policy}"
      for policy in config.policies.split(",")
      if policy != "kv_restore_host"
    ]
  )
  config.seeds = "0,1"
  return config
