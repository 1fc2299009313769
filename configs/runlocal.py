"""The path of `quickstart.py` with tiny sizes, to try things out.

  python -m experiments.run --config=configs/runlocal.py \
      --workdir=runs/runlocal

The shipped model on 4 virtual CPU devices, 6 short requests, three runs.
Expected: well under a minute, every verdict `true`; its speedups mean little.
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
  """The quickstart, small."""
  config = quickstart.get_config()
  config.ranks = 4
  config.options.update(rows=2, max_len=96, chunk=32, kv_block=32)
  config.workload.update(
    count=6, prompt_tokens=(16, 48), new_tokens=(16, 24), rate=3.0
  )
  config.fault_step = 10
  config.policies = "none,restart_cached,kv_restore"
  return config
