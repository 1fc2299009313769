"""Trains the byte-level MoE that ships with the project.

  python -m experiments.train --config=configs/train_shipped.py \
      --workdir=runs/train_shipped --export=resilient_moe/assets/byte_moe

The text comes with Python (`corpus.py`). A run that is started again with the
same work directory goes on where its last checkpoint was, to the same bits:
the batch of a step is a function of (seed, step). At the end the model is
scored on the held-out text beside an n-gram model, and exported with its card
(`train_card.py`). `--export_now` does that for the last checkpoint of a run,
finished or not, without training.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import corpus as corpus_lib
from experiments import train_card
from experiments.train_eval import evaluate, windows_at
from experiments.train_io import (
  MetricsLog,
  claim_workdir,
  open_checkpoints,
  read_metrics,
  restore,
)
from experiments.train_schedule import (
  check_same_past,
  learning_rate,
  shape_at,
  total_steps,
)
from resilient_moe.model import (
  ModelConfig,
  init_params,
  load_checkpoint,
  save_checkpoint,
  train_forward,
)

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and metrics.")
_EXPORT = flags.DEFINE_string("export", None, "Folder of the exported model.")
_EXPORT_NOW = flags.DEFINE_bool(
  "export_now", False, "Export the last checkpoint; don't train."
)


class State(NamedTuple):
  """All that a step reads and writes; `step` is also the data position."""

  step: jax.Array  # [] int32 steps done
  params: Any
  optimizer: Any


StepFn = Callable[[State, np.ndarray], tuple[State, dict[str, jax.Array]]]


def batch_at(
  config: ml_collections.ConfigDict, stream: np.ndarray, step: int
) -> np.ndarray:
  """The [B, T + 1] bytes of a step, a function of (seed, step)."""
  sequences, context = shape_at(config, step)
  rng = np.random.default_rng((config.seed, step))
  starts = rng.integers(0, len(stream) - context, sequences)
  return windows_at(stream, starts, context)


def make_optimizer(
  config: ml_collections.ConfigDict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW behind a global clip, and its learning rate."""
  schedule = learning_rate(config)
  adamw = optax.adamw(
    schedule,
    b2=config.beta2,
    weight_decay=config.weight_decay,
    mask=_decayed,
  )
  clip = optax.clip_by_global_norm(config.clip_norm)
  return optax.chain(clip, adamw), schedule


def _decayed(params: Any) -> Any:
  """Which parameters weight decay pulls at: all but the norms' scales."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "norm" not in str(path[-1]), params
  )


def balance_loss(aux: dict[str, jax.Array]) -> jax.Array:
  """E * sum_i f_i p_i, mean over layers (Fedus et al., Switch, eq. 4).

  1 when the load is even. The gradient flows through the probabilities only:
  the fraction of assignments f is a count.
  """
  load, probs = aux["expert_load"], aux["router_probs_mean"]  # [L, E] both
  load = jax.lax.stop_gradient(load)
  return (load * probs).sum(axis=1).mean() * load.shape[1]


def make_step(
  config: ml_collections.ConfigDict, model: ModelConfig
) -> tuple[State, StepFn]:
  """The initial state and the compiled step."""
  optimizer, schedule = make_optimizer(config)

  def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    logits, aux = train_forward(model, params, tokens[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()
    balance = balance_loss(aux)
    metrics = {
      "bits_per_byte": nats / np.log(2.0),
      "balance": balance,
      "load_min": aux["expert_load"].min(),
      "load_max": aux["expert_load"].max(),
    }
    return nats + config.balance_weight * balance, metrics

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, tokens: jax.Array) -> tuple[State, dict[str, Any]]:
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, tokens)
    updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = schedule(state.step)
    return State(state.step + 1, params, opt_state), metrics

  params = init_params(model, jax.random.key(config.seed))
  return State(jnp.int32(0), params, optimizer.init(params)), step


def train(
  config: ml_collections.ConfigDict,
  text: corpus_lib.Corpus,
  workdir: pathlib.Path,
  stop_at: int | None = None,
) -> State:
  """Runs to the end of the phases (or `stop_at`), from the last checkpoint."""
  model = ModelConfig(**config.model)
  state, step_fn = make_step(config, model)
  end = min(total_steps(config), stop_at or sys.maxsize)
  with open_checkpoints(workdir) as checkpoints:
    state = restore(checkpoints, state)
    log = MetricsLog(workdir, int(state.step), total_steps(config))
    for i in range(int(state.step), end):
      tokens = batch_at(config, text.train, i)
      state, metrics = step_fn(state, tokens)
      done = i + 1
      held_out = None
      if done % config.eval_every == 0 or done == end:
        held_out = evaluate(
          model, state.params, text.held_out[: config.eval_bytes],
          config.eval_context,
        ).bits_per_byte  # fmt: skip
      log.count(tokens[:, 1:].size)
      if done % config.log_every == 0 or held_out is not None:
        log.write(done, metrics, held_out)
      if done % config.checkpoint_every == 0 or done == end:
        checkpoints.save(done, args=ocp.args.StandardSave(state))
  return state


def export(
  config: ml_collections.ConfigDict,
  text: corpus_lib.Corpus,
  workdir: pathlib.Path,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Writes the last checkpoint's model, and its card, into `folder`."""
  model = ModelConfig(**config.model)
  state, _ = make_step(config, model)
  with open_checkpoints(workdir, read_only=True) as checkpoints:
    state = restore(checkpoints, state)
  save_checkpoint(folder, model, state.params, dtype="bfloat16")
  # What is scored is what was written, rounded to bfloat16.
  model, params = load_checkpoint(folder)
  record = json.loads((workdir / "run.json").read_text())
  metrics = read_metrics(workdir / "metrics.jsonl")
  return train_card.write(
    folder, model, params, text, record, int(state.step), metrics
  )


def main(argv: list[str]) -> None:
  """Trains, scores, exports."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.ERROR)  # orbax tells a page a checkpoint
  assert _WORKDIR.value is not None  # a required flag
  config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
  text = corpus_lib.load(config.text_bytes)
  if _EXPORT_NOW.value:
    if not (workdir / "run.json").is_file():
      raise ValueError(f"--export_now: no run in --workdir={workdir}")
  else:
    claim_workdir(config, text, workdir, check_same_past)
    train(config, text, workdir)
  if _EXPORT.value:
    card = export(config, text, workdir, pathlib.Path(_EXPORT.value))
    print(train_card.summary(card))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
