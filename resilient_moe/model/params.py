"""One description of each layer: shapes, shardings and initial values.

`describe(config)` is the only place that names the parameters. Arrays of a
run of equal layers are stacked on their first axis. Logical axes are mapped
to mesh axes in one table, `MESH_AXES`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from resilient_moe.model.config import ModelConfig

# Experts live in the physical slots of the expert-parallel axis; everything
# else is replicated (data-parallel attention).
MESH_AXES: dict[str, str | None] = {"expert": "ep"}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """An array before it is made."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]  # one logical name per dimension
  fan_in: int = 0  # initial values: normal / sqrt(fan_in); 0: ones
  dtype: str = "float32"

  @property
  def sharding(self) -> PartitionSpec:
    return PartitionSpec(*(MESH_AXES.get(axis) for axis in self.axes))

  @property
  def is_expert(self) -> bool:
    return "expert" in self.axes

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def is_spec(x: Any) -> bool:
  """For `jax.tree`: a `ParamSpec` is a leaf."""
  return isinstance(x, ParamSpec)


def _attention(c: ModelConfig, n: int) -> dict[str, Any]:
  heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
  out = c.n_heads * c.head_dim
  d, axis = c.d_model, "layer"
  return {
    "norm": ParamSpec((n, d), (axis, "embed")),
    "qkv": ParamSpec((n, d, heads), (axis, "embed", "heads"), d),
    "out": ParamSpec((n, out, d), (axis, "heads", "embed"), out),
  }


def _mlp(c: ModelConfig, n: int, width: int) -> dict[str, Any]:
  """SwiGLU with the gate's and the up projection's columns side by side."""
  d = c.d_model
  return {
    "gate_up": ParamSpec((n, d, 2 * width), ("layer", "embed", "mlp"), d),
    "down": ParamSpec((n, width, d), ("layer", "mlp", "embed"), width),
  }


def _moe(c: ModelConfig, n: int) -> dict[str, Any]:
  d, e, f = c.d_model, c.n_experts, c.expert_width
  lead = ("layer", "expert")
  moe: dict[str, Any] = {
    "router": ParamSpec((n, d, e), ("layer", "embed", "logits"), d),
    "experts": {
      "gate_up": ParamSpec((n, e, d, 2 * f), (*lead, "embed", "mlp"), d),
      "down": ParamSpec((n, e, f, d), (*lead, "mlp", "embed"), f),
    },
  }
  if c.shared_width:
    moe["shared"] = _mlp(c, n, c.shared_width)
  return moe


def describe(config: ModelConfig) -> dict[str, Any]:
  """The tree of `ParamSpec`s of a model."""
  c = config
  groups = []
  for kind, n in c.groups():
    layer: dict[str, Any] = {
      "attention": _attention(c, n),
      "mlp_norm": ParamSpec((n, c.d_model), ("layer", "embed")),
    }
    if kind == "moe":
      layer["moe"] = _moe(c, n)
    else:
      layer["mlp"] = _mlp(c, n, c.dense_width)
    groups.append(layer)
  specs: dict[str, Any] = {
    "embed": ParamSpec(
      (c.vocab_size, c.d_model), ("vocab", "embed"), c.d_model
    ),
    "groups": groups,
    "final_norm": ParamSpec((c.d_model,), ("embed",)),
  }
  if not c.tied_embeddings:
    specs["lm_head"] = ParamSpec(
      (c.d_model, c.vocab_size), ("embed", "vocab"), c.d_model
    )
  cast = lambda s: dataclasses.replace(s, dtype=c.dtype)
  return jax.tree.map(cast, specs, is_leaf=is_spec)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Random initial values of every parameter."""
  specs, tree = jax.tree.flatten(describe(config), is_leaf=is_spec)
  keys = jax.random.split(key, len(specs))
  values = [_initial(s, k) for s, k in zip(specs, keys, strict=True)]
  return jax.tree.unflatten(tree, values)


def _initial(spec: ParamSpec, key: jax.Array) -> jax.Array:
  if not spec.fan_in:
    return jnp.ones(spec.shape, spec.dtype)
  noise = jax.random.normal(key, spec.shape, spec.dtype)
  return noise / np.sqrt(spec.fan_in).astype(spec.dtype)


def count_params(config: ModelConfig) -> int:
  """How many numbers the model holds."""
  leaves = jax.tree.leaves(describe(config), is_leaf=is_spec)
  return sum(int(np.prod(s.shape)) for s in leaves)


def expert_bytes(config: ModelConfig) -> int:
  """Weights of one expert over all layers, in bytes."""
  leaves = jax.tree.leaves(describe(config), is_leaf=is_spec)
  return sum(s.nbytes for s in leaves if s.is_expert) // config.n_experts


def dense_bytes(config: ModelConfig) -> int:
  """Weights that every rank has, in bytes: all but the experts'."""
  leaves = jax.tree.leaves(describe(config), is_leaf=is_spec)
  return sum(s.nbytes for s in leaves if not s.is_expert)
