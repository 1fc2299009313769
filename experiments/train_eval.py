"""What a byte model is worth: bits per byte, load per expert, a sample."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.corpus import SEPARATOR
from resilient_moe.model import ModelConfig, train_forward


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Scores of a model on a byte stream."""

  bits: np.ndarray  # [n] float32 bits of each byte of the stream
  load: np.ndarray  # [L, E] fraction of assignments; rows sum to 1

  @property
  def bits_per_byte(self) -> float:
    return float(self.bits.mean(dtype=np.float64))

  @property
  def load_entropy(self) -> np.ndarray:
    """[L] entropy of the load over its maximum: 1 is perfectly even."""
    p = np.maximum(self.load, 1e-12)
    return -(p * np.log(p)).sum(axis=1) / np.log(self.load.shape[1])


def evaluate(
  config: ModelConfig,
  params: Any,
  stream: np.ndarray,
  context: int,
  batch: int = 8,
) -> Evaluation:
  """Scores each byte of a [n] uint8 stream once.

  Windows of `context` bytes advance by half their width and score what the
  one before has not, so every byte but the first `context` / 2 is predicted
  from at least that many before it. The stream starts behind a separator.
  """
  n, stride = len(stream), context // 2
  if not n or not stride:
    raise ValueError(f"{n} bytes, context {context}: at least 1 and 2")
  starts = np.arange(0, max(n - stride, 1), stride)
  padded = np.zeros(starts[-1] + context + 1, np.uint8)
  padded[0], padded[1 : n + 1] = SEPARATOR, stream
  windows = windows_at(padded, starts, context)
  bits = np.zeros(starts[-1] + context, np.float32)
  loads = []
  for first in range(0, len(windows), batch):
    part = windows[first : first + batch]
    rows = np.pad(part, ((0, batch - len(part)), (0, 0)), mode="edge")
    scored, load = _score(config, params, rows)
    loads.append(np.asarray(load) * len(part))
    rows = np.asarray(scored)[: len(part)]
    for start, row in zip(starts[first : first + batch], rows, strict=True):
      skip = stride if start else 0
      bits[start + skip : start + context] = row[skip:]
  return Evaluation(bits[:n], np.sum(loads, axis=0) / len(windows))


def windows_at(
  stream: np.ndarray, starts: np.ndarray, context: int
) -> np.ndarray:
  """[B, T + 1] int32 windows, the first byte of each a separator.

  Every prompt that is served begins with one, wherever its text was cut from,
  so that is how the model learns and is scored.
  """
  windows = stream[starts[:, None] + np.arange(context + 1)].astype(np.int32)
  windows[:, 0] = SEPARATOR
  return windows


def sample(
  config: ModelConfig,
  params: Any,
  prompt: bytes,
  n_bytes: int,
  seed: int,
  temperature: float = 0.7,
) -> bytes:
  """`prompt` continued by `n_bytes` sampled bytes."""
  tokens = np.zeros((1, len(prompt) + n_bytes), np.int32)
  tokens[0, : len(prompt)] = list(prompt)
  key = jax.random.key(seed)
  for at in range(len(prompt), tokens.shape[1]):
    logits = _logits_at(config, params, tokens, np.int32(at - 1))
    noise = jax.random.gumbel(jax.random.fold_in(key, at), logits.shape)
    tokens[0, at] = int(jnp.argmax(logits / temperature + noise))
  return bytes(tokens[0].astype(np.uint8))


@functools.partial(jax.jit, static_argnames="config")
def _score(
  config: ModelConfig, params: Any, windows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """[B, T + 1] -> bits [B, T] of the bytes after the first, load [L, E]."""
  logits, aux = train_forward(config, params, windows[:, :-1])
  log_p = jax.nn.log_softmax(logits)
  nats = -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=-1)[..., 0]
  return nats / np.log(2.0), aux["expert_load"]


@functools.partial(jax.jit, static_argnames="config")
def _logits_at(
  config: ModelConfig, params: Any, tokens: jax.Array, at: jax.Array
) -> jax.Array:
  """Logits [V] behind one position; what comes after it has no influence."""
  logits, _ = train_forward(config, params, tokens)
  return logits[0, at]
