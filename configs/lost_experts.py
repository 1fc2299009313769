"""What losing experts costs in quality.

  python -m experiments.lost_experts --config=configs/lost_experts.py \
      --workdir=runs/lost_experts
  python -m experiments.lost_experts --config=configs/lost_experts.py \
      --workdir=DIR --config.checkpoint=FOLDER --config.texts=a.txt,b.txt

After ReviveMoE's table of accuracy with missing experts (arXiv 2602.21140):
fractions of experts are lost, the most used ones of a task or every n-th, and
the gate takes the next best. Beside it the two alternatives: what they would
have added is dropped, or the nearest expert by weights answers.

Expected on 2 idle cores: about 3 minutes (75 cells). What to look for: one
lost expert of 16 costs 0.2 to 0.3 bits per byte, half of them 1.3 to 2.5; the
most used ones cost up to twice what every n-th costs; letting the gate choose
again (`masked`) is never much worse than the alternatives, and at 1/4 and 1/2
mostly better. The model is small: DeepSeek-V3 on 32 ranks loses 1/32 of its
experts with a rank and barely notices (mean accuracy 0.683 to 0.681 in the
paper), a model of 16 experts can't lose so few.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The shipped model on three held-out domains."""
  config = ml_collections.ConfigDict()
  config.checkpoint = "byte_moe"  # one that ships, or a folder (ours, public)
  config.dtype = "float32"  # of a public checkpoint's parameters
  config.texts = ""  # text files with commas; "": the domains below
  config.domains = "documentation,docstrings,code"
  config.fractions = "0,1/64,1/32,1/16,1/8,1/4,1/2"
  config.which = "most used,every n-th"
  config.how = "masked,dropped,nearest"
  config.context = 512  # tokens of a window
  config.warmup = 128  # of them, read and not scored
  config.windows = 64  # of a domain, at most
  config.batch = 8
  config.seed = 0  # of the intervals' resampling
  return config
