"""The policies side by side on processes that are really killed.

  python -m experiments.run --config=configs/processes.py \
      --workdir=runs/processes

Four worker processes under `jax.distributed`, the shipped model; one of them
gets SIGKILL in mid-decode. Expected on 2 idle cores: some 4 minutes, every
verdict `true`, `tokens_exact` 1, `kv_restore` within a few median steps,
`not_ready` (no mesh was made ready) in seconds, `restart_cached` with its
stages. A small comparison: `--config.seeds=0 --config.policies=kv_restore`.
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
  """The quickstart's comparison on 4 processes."""
  config = quickstart.get_config()
  config.runtime = "process"
  config.ranks = 4
  config.options.update(rows=4, max_len=256, chunk=32, kv_block=32)
  # Four requests a rank, all of them in mid-decode when the fault strikes.
  config.workload.update(
    count=16, prompt_tokens=(24, 64), new_tokens=(96, 140), rate=1.0
  )
  config.policies = (
    "none,restart_cached,mesh_shrink,replica_promotion,kv_restore,"
    "kv_restore_host,not_ready"
  )
  config.seeds = "0,1,2"

  # Fields of `runtime.process.rules.Limits` and `cluster.Cluster`.
  config.detector = {"probe_interval_s": 0.01, "misses": 3, "stuck_s": 0.5}
  config.cluster = {"listen": "127.0.0.1:0", "spawn": True, "platform": "cpu"}
  return config
