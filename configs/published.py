"""What papers publish, composed again: inputs that the papers do not state.

  python -m experiments.published --config=configs/published.py \
      --workdir=runs/published

Expected: seconds; no accelerator, no run. Of 48 predicted numbers 37 are
within 25%, the median error is 11%; the table says which are not, and why as
far as it can be known. Every value here is an assumption that the table names;
`--config.eep.slots_per_rank=17` shows what one of them does.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """One group of values a system."""
  config = ml_collections.ConfigDict()
  config.only = ""  # systems with commas; "": all
  config.revive = {
    "attention": 48,  # of 80 ranks; its lost-expert study has EP 32
    "rows": 16,  # sequences of an attending rank
    "chunk": 4_096,
  }
  config.tarragon = {  # its Random workload, in the middle of its rates
    "requests_per_s": 50.0,
    "prompt": 10,
    "output": 128,
  }
  config.eep = {
    "slots_per_rank": 16,  # as SGLang's Elastic EP: 256 redundant experts
    "gpu": "h100",  # "NVIDIA GPUs, 8 x 400G"
    "zipf_exponent": 0.0,
  }
  config.rates = {"ranks": 32, "prompt": 4_096}
  return config
