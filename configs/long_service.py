"""Ten minutes of service on processes, without a fault: are there alarms?

  python -m experiments.run --config=configs/long_service.py \
      --workdir=runs/long_service

Four worker processes and everything that detects: probes every 10 ms, the step
watchdog, stragglers. Let something else keep all cores busy meanwhile (the test
suite, say). Expected: some ten minutes, a verdict `true` (a failure would end
the run: nobody recovers under `none`) and `false_alarms` 0 in table.csv. How
long it takes depends on the machine: raise `--config.workload.count` for more.
"""

import ml_collections

from configs import processes


def get_config() -> ml_collections.ConfigDict:
  """A long run whose only purpose is that nothing happens."""
  config = processes.get_config()
  config.policies = "none"
  config.faults = "none"
  config.seeds = "0"
  config.workload.update(count=1300, rate=0.12)
  config.workload.new_tokens = (100, 140)
  return config
