"""The quickstart's comparison in virtual time: seconds for all policies.

  python -m experiments.run --config=configs/simulated.py \
      --workdir=runs/simulated

The same requests, faults, policies, plans and checkers as `quickstart.py`, no
arrays: how long steps and actions take was fitted to emulated runs of it
(`experiments.calibrate`; table.md says which). Expected: under 30 s on 2 idle
cores, every verdict `true`. Other numbers, and other hardware:

  --config.sim.calibration=process       fitted to real processes
  --config.sim.calibration=FILE          of experiments.calibrate
  --config.sim.device=h100 --config.sim.model=NAME   a roofline (`sim.devices`,
                                         `sim.shapes`), not calibrated
  --config.sim.detect_s=0.5              a slower detector
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
  """The quickstart, simulated, with more policies and seeds."""
  config = quickstart.get_config()
  config.runtime = "simulated"
  config.sim = {"calibration": "emulated"}
  config.policies = (
    "none,restart_cached,mesh_shrink,replica_promotion,kv_restore,"
    "kv_restore_host,mask_experts,spare,retry,eep,cheapest"
  )
  config.seeds = "0,1,2"
  return config
