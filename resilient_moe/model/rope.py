"""Rotary position embedding (Su et al., 2021) and its scalings.

The frequencies are constants of a program: computed here in float64, rounded
once.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resilient_moe.model.config import ModelConfig


class Turns(NamedTuple):
  """Cosine and sine of each position's angles, equal for all layers."""

  cos: jax.Array  # [N, d / 2] float32
  sin: jax.Array


def turns(positions: jax.Array, config: ModelConfig) -> Turns:
  """What `rope` turns tokens at these positions [N] by."""
  inv = frequencies(config)
  angle = positions.astype(jnp.float32)[:, None] * inv[None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if config.rope_magnitude != 1:
    cos, sin = cos * config.rope_magnitude, sin * config.rope_magnitude
  return Turns(cos, sin)


def rope(x: jax.Array, by: Turns) -> jax.Array:
  """Rotates halves (x1, x2): [N, H, d] -> [N, H, d]."""
  half = x.shape[-1] // 2
  cos, sin = by.cos[:, None, :], by.sin[:, None, :]
  x1, x2 = x[..., :half], x[..., half:]
  turned = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def frequencies(config: ModelConfig) -> np.ndarray:
  """Radians a position of each pair, [d / 2] float32."""
  d = config.rotated_width
  plain = config.rope_theta ** (-np.arange(0, d, 2) / d)
  scale = {"none": _none, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
  return scale[config.rope_scaling](config, plain).astype(np.float32)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
  """What YaRN stretches the scores by (arXiv 2309.00071, section 3.4)."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _none(c: ModelConfig, plain: np.ndarray) -> np.ndarray:
  del c
  return plain


def _linear(c: ModelConfig, plain: np.ndarray) -> np.ndarray:
  return plain / c.rope_factor


def _llama3(c: ModelConfig, plain: np.ndarray) -> np.ndarray:
  """Llama 3.1: short waves stay, long ones are stretched, smooth between."""
  turns = c.rope_length * plain / (2 * math.pi)  # within the first training
  keep = (turns - c.rope_low) / (c.rope_high - c.rope_low)
  keep = np.clip(keep, 0, 1)
  return keep * plain + (1 - keep) * plain / c.rope_factor


def _yarn(c: ModelConfig, plain: np.ndarray) -> np.ndarray:
  """YaRN, section 3.2 ("NTK-by-parts"), with the bounds of its dimensions."""
  d = c.rotated_width

  def dimension(turns: float) -> float:
    wave = c.rope_length / (turns * 2 * math.pi)
    return d * math.log(wave) / (2 * math.log(c.rope_theta))

  low, high = dimension(c.rope_fast), dimension(c.rope_slow)
  if c.rope_truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, d - 1)
  if low == high:
    high += 0.001  # the ramp is a step
  stretch = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
  return plain * (1 - stretch) + plain / c.rope_factor * stretch
