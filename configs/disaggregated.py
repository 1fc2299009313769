"""Attention and expert workers as failure domains of their own.

  python -m experiments.run --config=configs/disaggregated.py \
      --workdir=runs/disaggregated
  python -m experiments.run --config=configs/disaggregated.py \
      --workdir=runs/disaggregated_emulated --config.runtime=emulated

Two attention workers (AW), four expert workers (EW) and a store of KV
checkpoints, processes all of them, serve the shipped model; an EW gets SIGKILL
in mid-decode (`ew_lost`), in other runs an AW (`aw_lost`). What this
reproduces: Tarragon's comparison of its recovery with a restart (213 and 160
times shorter stalls on its cluster) and, beside it, ReviveMoE's disaggregated
mode. On 2 cores nothing overlaps: read ratios, not seconds.

Expected on 2 idle cores: some 12 minutes (48 runs, a restart's three times as
long as the others), every verdict `true`, `tokens_exact` 1. What to look for
in table.md:

- `ew_lost`, `tarragon`: `healed_s` is a few steps, mostly before `plan_s` is
  over, since attention workers ask the shadows by themselves;
  `affected_stall_steps` about 2 beyond detection, where `mesh_shrink` and
  `role_switch` pay for copies in `resume_s`;
- `aw_lost`: `unaffected_stall_max_steps` stays below 3, as the other attention
  worker goes on; `kv_bytes_restored` in place of `tokens_recomputed` where
  there is a store;
- `restart_cached`: seconds, its stages in the breakdown below the table, and
  from them `affected_speedup_vs_restart` of the others;
- `checkpoint_ratio`: KV checkpoints over embeddings on the links.

`python -m experiments.trace --run=DIR/ew_lost/tarragon/seed0` draws one run;
add `--config.exchange.trace=True` above to see every worker in it. A small
comparison: `--config.seeds=0 --config.policies=tarragon,restart_cached`.
"""

import ml_collections

from configs import processes


def get_config() -> ml_collections.ConfigDict:
  """The comparison on 2 attention and 4 expert workers."""
  config = processes.get_config()
  config.deployment = "disaggregated"
  config.ranks = 6
  config.attention = 2
  # Four requests an attention worker, all of them in mid-decode when the fault
  # strikes; steps of both count.
  config.workload.update(
    count=8, prompt_tokens=(24, 64), new_tokens=(96, 140), rate=1.0
  )
  config.fault_step = 60
  config.scenarios = "ew_lost,aw_lost"
  config.policies = (
    "none,restart_cached,tarragon,revive_moe,role_switch,kv_restore_host,"
    "mesh_shrink,replica_promotion"
  )
  config.seeds = "0,1,2"
  return config
