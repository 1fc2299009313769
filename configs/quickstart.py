"""A rank is lost in mid-sentence, and every policy recovers the same run.

  python -m experiments.run --config=configs/quickstart.py \
      --workdir=runs/quickstart

The shipped byte-level MoE on 8 virtual CPU devices, 32 text prompts, one rank
lost at step 60 of about 200; `make demo` is this command. Expected: under 4
minutes on 2 cores with the installation, every verdict `true`, `tokens_exact`
1 for every policy but `mask_experts` (which is lossy), and an
`affected_speedup_vs_restart` of at least 20 for `mesh_shrink` and 50 for
`kv_restore`. `configs/runlocal.py` takes the same path in less.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The comparison of `make demo`."""
  config = ml_collections.ConfigDict()
  config.checkpoint = "byte_moe"
  config.runtime = "emulated"
  config.deployment = "collocated"
  config.ranks = 8
  config.attention = 0  # disaggregated: how many of them attend
  config.exchange = {}  # disaggregated: as --config.exchange.dedup=False
  config.options = {"rows": 4, "max_len": 384, "chunk": 64}

  # Four requests a rank, all of them in mid-decode when the fault strikes.
  config.workload = {
    "count": 32,
    "prompt_tokens": (48, 160),
    "new_tokens": (96, 160),
    "temperatures": (0.0, 0.0, 0.0, 0.8),
    "arrivals": "steps",
    "rate": 2.0,
  }

  config.scenarios = "rank_lost_decode"
  config.faults = "scenario"  # or `none`: the same without faults
  config.fault_step = 60
  config.fault_rank = -1  # the seed draws it
  config.wait_ready = True

  config.policies = (
    "none,restart_cached,mesh_shrink,replica_promotion,kv_restore,"
    "mask_experts,spare,retry"
  )
  # By policy, as in --config.policy_kwargs.kv_restore.checkpoint=host.
  config.policy_kwargs = ml_collections.ConfigDict()
  config.seeds = "0"
  config.slo = {"ttft_slo_s": 2.0, "tbt_slo_s": 0.2}
  return config
