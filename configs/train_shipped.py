"""The byte-level MoE that ships in `resilient_moe/assets/byte_moe`.

  python -m experiments.train --config=configs/train_shipped.py \
      --workdir=runs/train_shipped --export=resilient_moe/assets/byte_moe

About an hour on two busy cores: 1.65 bits per byte on the held-out text, where
Kneser-Ney of order 8 has 1.87. The model card beside the weights has the rest.
The run was made in three sittings, its later phases cut to fit the hour while
they lay ahead; `train_schedule.check_same_past` is why that changes nothing.
`--config=configs/train_shipped.py:runlocal` takes the same path in seconds.
"""

import ml_collections


def get_config(variant: str = "shipped") -> ml_collections.ConfigDict:
  """The shipped run, or `runlocal`: a tiny model on a sliver of the text."""
  if variant not in ("shipped", "runlocal"):
    raise ValueError(f"variant {variant!r}: choose one of shipped, runlocal")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = {
    "n_layers": 4,
    "d_model": 128,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 32,
    "n_experts": 16,
    "top_k": 2,
    "expert_width": 96,
    "tied_embeddings": True,
  }
  config.text_bytes = 0  # of each side of the split; 0: all of it

  # (steps, sequences a step, bytes a sequence): short contexts first, because
  # attention over them costs less and most of what a byte needs is near.
  config.phases = ((1200, 16, 128), (1800, 8, 256), (1000, 4, 512))
  # Warm-up, constant, then a cosine to (almost) zero over the last steps: what
  # lies ahead of a run can be lengthened or cut while it is in progress.
  config.learning_rate = 3e-3
  config.warmup_steps = 100
  config.decay_steps = 1200
  config.weight_decay = 0.1
  config.beta2 = 0.99
  config.clip_norm = 1.0
  config.balance_weight = 0.01  # of the Switch balance loss

  config.log_every = 20
  config.checkpoint_every = 200
  config.eval_every = 200
  config.eval_bytes = 16_384  # held-out slice followed during the run
  config.eval_context = 512
  config.sample_bytes = 400

  if variant == "runlocal":
    config.model.update(
      n_layers=2, d_model=32, head_dim=8, n_experts=4, expert_width=16
    )
    config.text_bytes = 40_000
    config.phases = ((20, 4, 32), (10, 2, 64))
    config.warmup_steps = config.decay_steps = 10
    config.log_every = config.checkpoint_every = config.eval_every = 10
    config.eval_bytes = 1024
    config.eval_context = 64
    config.sample_bytes = 16
  return config
