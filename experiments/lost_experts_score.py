"""Scores of one domain with some experts gone, and their intervals."""

import dataclasses
import fractions
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lost_experts_texts import Windows
from resilient_moe.model import lost as lost_lib
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.forward import expert_load, forward

MOST_USED, EVERY_NTH = "most used", "every n-th"
WHICH = (MOST_USED, EVERY_NTH)
MASK, DROP, NEAREST = "masked", "dropped", "nearest"
HOW = (MASK, DROP, NEAREST)
BOOTSTRAP = 1000  # resamples of an interval
# Whole products: nothing else is in the batch that a row could depend on.
OPTIONS = StepOptions(row_block=0, expert_block=64)


@dataclasses.dataclass(frozen=True)
class Loss:
  """Which experts are gone, and what is done about it."""

  count: int  # experts of every layer
  which: str = ""
  how: str = ""

  @property
  def name(self) -> str:
    """Of its file."""
    if not self.count:
      return "whole"
    return f"{self.count}-{self.which}-{self.how}".replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class Score:
  """Sums over the scored tokens of each window; all [W]."""

  bits: np.ndarray
  right: np.ndarray  # tokens whose likeliest next token was the real one
  tokens: np.ndarray
  bytes: np.ndarray


def counts(texts: Sequence[str], config: ModelConfig) -> dict[int, str]:
  """How many of the experts each fraction stands for: {count: fraction}.

  A fraction smaller than one expert stands for one; fractions that come to
  the same number are asked once.

  Raises:
    ValueError: not a fraction, or too few experts would be left.
  """
  found: dict[int, str] = {}
  for text in texts:
    try:
      share = fractions.Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
      raise ValueError(
        f"fractions: {text!r} is no fraction; as in 0,1/32,1/4"
      ) from error
    if not 0 <= share < 1:
      raise ValueError(f"fractions: {text}: at least 0 and below 1")
    count = max(round(share * config.n_experts), 1) if share else 0
    if config.n_experts - count < config.top_k:
      raise ValueError(
        f"fractions: {text} of {config.n_experts} experts leaves "
        f"{config.n_experts - count}; a token needs {config.top_k}"
      )
    real = fractions.Fraction(count, config.n_experts)
    found[count] = str(real)
  return found


def gone(loss: Loss, load: np.ndarray) -> np.ndarray:
  """[E] bool: the experts that are lost, alike in every layer.

  `load` [L_moe, E] is what the domain uses. A rank holds the same experts of
  every layer, so the most used ones are those of all layers together.
  """
  n_experts = load.shape[1]
  found = np.zeros(n_experts, bool)
  if loss.which == MOST_USED:
    found[np.argsort(-load.sum(axis=0), kind="stable")[: loss.count]] = True
  else:
    found[np.arange(loss.count) * n_experts // max(loss.count, 1)] = True
  return found


def load_of(
  config: ModelConfig, params: Any, windows: Windows, batch: int
) -> np.ndarray:
  """Share of each layer's assignments that an expert gets, [L_moe, E]."""
  parts = [
    np.asarray(expert_load(config, params, rows, OPTIONS)) * n
    for rows, _, n in _batches(windows.tokens, batch)
  ]
  return np.asarray(np.sum(parts, axis=0) / len(windows.tokens))


def score(
  config: ModelConfig,
  params: Any,
  windows: Windows,
  loss: Loss,
  load: np.ndarray,
  batch: int,
) -> Score:
  """Bits and hits of every window of a domain."""
  lost = None
  if loss.count:
    missing = gone(loss, load)
    if loss.how == MASK:
      lost = lost_lib.mask(config, missing)
    elif loss.how == DROP:
      lost = lost_lib.drop(config, missing)
    else:
      lost = lost_lib.substitute(config, params, missing)
  bits, right, first = [], [], 0
  for rows, wanted, n in _batches(windows.tokens, batch):
    logits = forward(config, params, rows, OPTIONS, lost)
    cost, hit = (np.asarray(x)[:n] for x in _measure(logits, wanted))
    counted = windows.scored[first : first + n]
    bits.append((cost * counted).sum(axis=1, dtype=np.float64))
    right.append((hit & counted).sum(axis=1))
    first += n
  return Score(
    np.concatenate(bits), np.concatenate(right),
    windows.scored.sum(axis=1),
    (windows.sizes * windows.scored).sum(axis=1),
  )  # fmt: skip


def _batches(
  tokens: np.ndarray, batch: int
) -> Iterator[tuple[jax.Array, jax.Array, int]]:
  """Equal batches of [W, T + 1]: read, to be predicted, how many count."""
  for first in range(0, len(tokens), batch):
    part = tokens[first : first + batch]
    rows = np.pad(part, ((0, batch - len(part)), (0, 0)), mode="edge")
    yield jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:]), len(part)


@jax.jit
def _measure(
  logits: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """[B, T, V], [B, T] -> bits of each token, whether it was likeliest."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  nats = -jnp.take_along_axis(log_p, wanted[:, :, None], axis=-1)[..., 0]
  return nats / np.log(2.0), logits.argmax(axis=-1) == wanted


def interval(
  above: np.ndarray, below: np.ndarray, document: np.ndarray, seed: int
) -> tuple[float, float, float]:
  """sum(above) / sum(below), and its 95% bootstrap interval.

  Documents are resampled, not windows: text of one document is alike. With a
  single document, its windows are.
  """
  groups = document
  if len(np.unique(document)) == 1:
    groups = np.arange(len(document))
  _, index = np.unique(groups, return_inverse=True)
  a = np.bincount(index, weights=above)
  b = np.bincount(index, weights=below)
  rng = np.random.default_rng(seed)
  picks = rng.integers(0, len(a), (BOOTSTRAP, len(a)))
  ratios = a[picks].sum(axis=1) / b[picks].sum(axis=1)
  low, high = np.percentile(ratios, (2.5, 97.5))
  return float(a.sum() / b.sum()), float(low), float(high)
