"""Every benchmark of the README's table of targets, as ratios within one run.

  python -m experiments.bench --config=configs/bench.py --workdir=runs/bench
  python -m experiments.bench --config=configs/bench.py --workdir=DIR \
      --config.only=stall,checkpoint

Expected on 2 idle cores: about an hour for everything, most of it `stall` with
the larger model; each `split_*` takes 1 to 5 minutes. `--config.quick=True`
takes the same path with tiny sizes in some minutes; its numbers mean nothing.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The shipped model, and one of 464 MB with random weights."""
  config = ml_collections.ConfigDict()
  config.only = ""  # names with commas; "": all
  config.only_models = ""  # likewise
  config.quick = False
  config.ranks = 8
  config.policies = (
    "none,restart_cached,mesh_shrink,replica_promotion,kv_restore"
  )
  config.models = {
    "shipped": {
      "checkpoint": "byte_moe",
      "model": {},
      "options": {"rows": 4, "max_len": 384, "chunk": 64},
      "workload": {
        "count": 32,
        "prompt_tokens": (48, 160),
        "new_tokens": (96, 160),
        "temperatures": (0.0, 0.0, 0.8),
      },
      "fault_step": 40,
      "seeds": (0, 1, 2),
      "kv_restore_steps": 4.0,
    },
    "larger": {
      "checkpoint": "",  # written once into the work directory
      "model": {
        "n_layers": 8,
        "d_model": 512,
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 64,
        "n_experts": 32,
        "top_k": 4,
        "expert_width": 256,
      },
      "options": {"rows": 2, "max_len": 2048, "chunk": 128},
      "workload": {
        "count": 16,
        "prompt_tokens": (1000, 1850),
        "new_tokens": (110, 150),
        "temperatures": (0.0, 0.0, 0.8),
      },
      "split": False,
      "fault_step": 60,  # everybody decodes, at contexts of 1,030 to 1,910
      "seeds": (0, 1),
      "kv_restore_steps": 10.0,
    },
  }
  config.pairs = 12  # interleaved pairs of blocks (off, on)
  config.block_steps = 16  # steps of a block
  config.calls = 40  # timed calls of each variant, interleaved
  config.plan_ranks = 10_240
  config.plan_repeats = 21
  config.cache_lens = (512, 2048, 8192)
  config.dispatch_ranks = (2, 4, 8)
  config.contexts = (256, 1024)  # of `layout`
  config.pause_s = 0.0  # between two steps of `ready`
  config.split = {
    "ranks": 6,
    "attention": 2,
    "processes": (4, 6),  # collocated beside it; their rows are as many
    "block_steps": 24,
    "restore_tokens": (64, 128, 256, 512, 1024),
    "restore_repeats": 5,
    "pingpong_rows": (8, 24, 64),
    # n_kv_heads * head_dim : top_k * d_model = 1 : 8, as 8 * 128 : 2 * 4096.
    "shape": {
      "n_layers": 4,
      "d_model": 128,
      "n_heads": 8,
      "n_kv_heads": 2,
      "head_dim": 16,
      "n_experts": 8,
      "top_k": 2,
      "expert_width": 448,
    },
    "stall": {
      "scenarios": "ew_lost,aw_lost",
      "policies": "restart_cached,tarragon",
      "seeds": "0,1,2",
    },
  }

  # What `quick` puts in place of the above.
  tiny = {
    "checkpoint": "",
    "model": {
      "n_layers": 1,
      "d_model": 32,
      "n_heads": 2,
      "n_kv_heads": 1,
      "head_dim": 16,
      "n_experts": 4,
      "top_k": 2,
      "expert_width": 16,
    },
    "options": {"rows": 2, "max_len": 64, "chunk": 16, "kv_block": 16},
    "workload": {
      "count": 4,
      "prompt_tokens": (8, 16),
      "new_tokens": (24, 30),
      "temperatures": (0.0,),
    },
    "fault_step": 8,
    "seeds": (0,),
    "kv_restore_steps": 4.0,
  }
  config.quick_changes = {
    "ranks": 2,
    "policies": "none,restart_cached,kv_restore",
    "models": {"tiny": tiny},
    "pairs": 2,
    "block_steps": 2,
    "calls": 2,
    "plan_ranks": 512,
    "plan_repeats": 2,
    "cache_lens": (32, 64),
    "dispatch_ranks": (2,),
    "contexts": (32,),
    "split": {
      **config.split.to_dict(),
      "ranks": 4,
      "attention": 2,
      "processes": (2,),
      "block_steps": 2,
      "restore_tokens": (16,),
      "restore_repeats": 1,
      "pingpong_rows": (2,),
      "shape": tiny["model"],
    },
    "pause_s": 0.05,  # else a busy machine starves the compiler
  }
  return config
