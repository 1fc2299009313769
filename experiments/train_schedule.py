"""What each step of a training run does: its batch shape and learning rate.

Both are functions of the config and the step alone, so that a resumed run is
the run, and that a run in progress can be made longer or shorter as long as
what it has done stays the same.
"""

import json
from typing import Any

import ml_collections
import numpy as np
import optax


def total_steps(config: ml_collections.ConfigDict) -> int:
  """Steps of all phases."""
  return sum(steps for steps, _, _ in config.phases)


def shape_at(config: ml_collections.ConfigDict, step: int) -> tuple[int, int]:
  """(sequences, bytes a sequence) of a step."""
  ends = np.cumsum([steps for steps, _, _ in config.phases])
  phase = int(np.searchsorted(ends, step, side="right"))
  return config.phases[phase][1], config.phases[phase][2]


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear warm-up, constant, cosine to a hundredth."""
  peak, decay = config.learning_rate, config.decay_steps
  parts = [
    optax.linear_schedule(0.0, peak, config.warmup_steps),
    optax.cosine_decay_schedule(peak, decay, alpha=0.01),
  ]
  return optax.join_schedules(parts, [total_steps(config) - decay])


def check_same_past(
  config: ml_collections.ConfigDict, old: dict[str, Any], done: int
) -> None:
  """Raises ValueError unless both configs take the same first `done` steps.

  So a run in progress can be made longer or shorter, and what comes out is
  what the new config alone would have given.
  """
  new, before = json.loads(config.to_json()), ml_collections.ConfigDict(old)
  ahead = ("phases", "decay_steps")
  for key in sorted(set(new) | set(old)):
    if key not in ahead and new.get(key) != old.get(key):
      raise ValueError(
        f"config.{key} is {new.get(key)}, but {old.get(key)} in the run of "
        "this work directory: choose a new --workdir"
      )
  for name, of in (("phases", shape_at), ("decay_steps", _rate_at)):
    if done and any(of(config, i) != of(before, i) for i in range(done)):
      raise ValueError(
        f"config.{name} changes one of the {done} steps already done: choose "
        "a new --workdir"
      )


def _rate_at(config: ml_collections.ConfigDict, step: int) -> int:
  """The learning rate's position in its decay; 0 before it."""
  return max(0, step - total_steps(config) + config.decay_steps)
