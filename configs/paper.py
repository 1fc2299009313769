"""Every table and figure of a paper, from what is stored.

  python -m experiments.paper --config=configs/paper.py --workdir=runs/paper
  python -m experiments.paper --config=configs/paper.py --workdir=runs/paper \
      --config.sources.comparison=runs/quickstart \
      --config.sources.fleet=runs/fleet
  python -m experiments.paper --config=configs/paper.py --workdir=runs/paper \
      --config.make=True

Reads the work directories that `sources` names (empty: WORKDIR/sources/NAME)
and writes figures/, tables/, paper.tex, paper.md and paper.json: for each
artefact its files, and the command, runtime, seeds and calibration of its
data. What isn't there is listed with the command that makes it; `make` runs
those, in the small sizes below: expected are some 15 minutes on 2 idle cores.
For the sizes of a paper run the commands without what follows `--workdir`, and
with `--config.seeds=0,1,2,3,4`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """What a paper is made of."""
  config = ml_collections.ConfigDict()
  config.make = False  # run the commands of what is missing
  config.only = ""  # names of sources with commas; "": all
  # Where the data lies; empty: WORKDIR/sources/NAME.
  config.sources = {
    "comparison": "",
    "processes": "",
    "disaggregated": "",
    "simulated": "",
    "fleet": "",
    "lost_experts": "",
    "published": "",
  }
  # What makes it, without --workdir; the module says how it is read.
  config.commands = {
    "comparison": "experiments.run --config=configs/quickstart.py",
    "processes": "experiments.run --config=configs/processes.py"
    " --config.seeds=0",
    "disaggregated": "experiments.run --config=configs/disaggregated.py"
    " --config.seeds=0",
    "simulated": "experiments.run --config=configs/simulated.py",
    "fleet": "experiments.fleet --config=configs/fleet.py"
    " --config.instances=1,16,160 --config.seeds=0,1"
    " --config.policies=restart_cached,mesh_shrink,replica_promotion,"
    "kv_restore,spare,cheapest",
    "lost_experts": "experiments.lost_experts --config=configs/lost_experts.py"
    " --config.fractions=0,1/16,1/4,1/2 --config.windows=16"
    " --config.domains=documentation,code",
    "published": "experiments.published --config=configs/published.py",
  }
  return config
