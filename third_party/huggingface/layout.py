"""Which tensor on disk is which part of which parameter.

A family describes one layer at a time: for each parameter of it the tensors
that make it up, each with its shape on disk, where in the parameter it goes,
and how it is turned on the way. What is described is checked against the
headers before anything is read, then read tensor by tensor.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from resilient_moe.model.config import ModelConfig

Path = tuple[str, ...]  # of a parameter, in a layer's tree
Turn = Callable[[np.ndarray], np.ndarray]
ALL = slice(None)


def as_is(x: np.ndarray) -> np.ndarray:
  """Vectors and embeddings."""
  return x


def transposed(x: np.ndarray) -> np.ndarray:
  """[out, in] <-> [in, out]."""
  return x.T


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor on disk, and what it is of a parameter (of one layer)."""

  name: str
  shape: tuple[int, ...]  # on disk
  where: tuple[slice, ...] = ()  # in the parameter; (): all of it
  turn: Turn = as_is
  index: int | None = None  # only this one of the tensor's first axis


Parts = dict[Path, list[Part]]


@dataclasses.dataclass(frozen=True)
class Model:
  """A checkpoint's config, and how its tensors are laid out.

  Attributes:
    config: what the model computes.
    layer: the parameters of a layer but for its routed experts.
    expert: (layer, expert) -> the parameters of a routed expert there.
    ignores: whether a tensor is no part of the decoder.
  """

  config: ModelConfig
  layer: Callable[[int], Parts]
  expert: Callable[[int, int], Parts]
  ignores: Callable[[str], bool] = lambda name: False

  def outer(self) -> Parts:
    """The parameters outside the layers."""
    c = self.config
    table = (c.vocab_size, c.d_model)
    parts: Parts = {
      ("embed",): [Part("model.embed_tokens.weight", table)],
      ("final_norm",): [Part("model.norm.weight", (c.d_model,))],
    }
    if not c.tied_embeddings:
      parts["lm_head",] = [Part("lm_head.weight", table, (), transposed)]
    return parts

  def moe_layers(self) -> list[int]:
    """The layers with experts, in order."""
    return [
      i for i in range(self.config.n_layers) if not self.config.is_dense(i)
    ]

  def tensors(self) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its name, with its shape on disk."""
    each = [self.outer(), *map(self.layer, range(self.config.n_layers))]
    for layer in self.moe_layers():
      each += [self.expert(layer, e) for e in range(self.config.n_experts)]
    return {
      part.name: part.shape
      for parts in each
      for sources in parts.values()
      for part in sources
    }


def linear(
  name: str, columns: int, rows: int, start: int | None = None
) -> Part:
  """A matrix of the model, [rows, columns]; on disk [out, in].

  `start`: its first column in a parameter that holds several side by side.
  """
  where = () if start is None else (ALL, slice(start, start + columns))
  return Part(f"{name}.weight", (columns, rows), where, transposed)


def bias(name: str, width: int, start: int | None = None) -> Part:
  """A linear layer's bias, or its part of several."""
  where = () if start is None else (slice(start, start + width),)
  return Part(f"{name}.bias", (width,), where)


def norms(c: ModelConfig, prefix: str) -> Parts:
  """The two norms of a layer."""
  return {
    ("attention", "norm"): [
      Part(f"{prefix}.input_layernorm.weight", (c.d_model,))
    ],
    ("mlp_norm",): [
      Part(f"{prefix}.post_attention_layernorm.weight", (c.d_model,))
    ],
  }


def grouped_attention(c: ModelConfig, prefix: str) -> Parts:
  """Grouped-query attention, and the layer's norms."""
  at = f"{prefix}.self_attn"
  q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
  each = (("q_proj", q, 0), ("k_proj", kv, q), ("v_proj", kv, q + kv))
  parts = norms(c, prefix) | {
    ("attention", "qkv"): [
      linear(f"{at}.{name}", width, c.d_model, start)
      for name, width, start in each
    ],
    ("attention", "out"): [linear(f"{at}.o_proj", c.d_model, q)],
  }
  if c.attention_bias:
    parts["attention", "qkv_bias"] = [
      bias(f"{at}.{name}", width, start) for name, width, start in each
    ]
    parts["attention", "out_bias"] = [bias(f"{at}.o_proj", c.d_model)]
  if c.qk_norm != "none":
    whole = c.qk_norm == "projection"
    for name, width in (("q_norm", q), ("k_norm", kv)):
      shape = (width if whole else c.head_dim,)
      parts["attention", name] = [Part(f"{at}.{name}.weight", shape)]
  return parts


def swiglu(
  prefix: str, d: int, width: int, path: Path = (),
  names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Parts:  # fmt: skip
  """Gate and up side by side, and down."""
  gate, up, down = (f"{prefix}.{name}" for name in names)
  return {
    (*path, "gate_up"): [
      linear(gate, width, d, 0), linear(up, width, d, width)
    ],
    (*path, "down"): [linear(down, d, width)],
  }  # fmt: skip


def assemble(
  out: np.ndarray, parts: list[Part], read: Callable[..., np.ndarray]
) -> None:
  """Fills a parameter of one layer, one tensor at a time."""
  for part in parts:
    out[part.where or ...] = part.turn(read(part.name, part.index))


def take_apart(value: np.ndarray, part: Part) -> np.ndarray:
  """What a tensor holds of a parameter; `turn` is its own inverse here."""
  return np.ascontiguousarray(part.turn(value[part.where or ...]))


def at(tree: dict[str, Any], path: Path) -> Any:
  """A leaf of nested dicts."""
  for key in path:
    tree = tree[key]
  return tree
