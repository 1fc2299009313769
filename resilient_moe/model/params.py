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
  dtype: str = ""  # `describe` fills in the model's

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


def describe(config: ModelConfig) -> dict[str, Any]:
  """The tree of `ParamSpec`s of a model.

  `embed`, `groups` (one subtree a run of equal layers, `config.groups()`),
  `experts` (one stack over all MoE layers, in order), `final_norm`, and
  `lm_head` where the embeddings aren't tied. A product is `x @ w`.
  """
  c = config
  groups = []
  for kind, n in c.groups():
    layer: dict[str, Any] = {
      "attention": _latent(c, n) if c.attention == "mla" else _grouped(c, n),
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
    "experts": _experts(c),
    "final_norm": ParamSpec((c.d_model,), ("embed",)),
  }
  if not c.tied_embeddings:
    specs["lm_head"] = ParamSpec(
      (c.d_model, c.vocab_size), ("embed", "vocab"), c.d_model
    )
  cast = lambda s: dataclasses.replace(s, dtype=s.dtype or c.dtype)
  return jax.tree.map(cast, specs, is_leaf=is_spec)


def _grouped(c: ModelConfig, n: int) -> dict[str, Any]:
  """Queries, keys and values come out of one product, in this order."""
  heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
  specs = {"qkv": _matrix(n, c.d_model, heads, "embed", "heads")}
  if c.attention_bias:
    specs["qkv_bias"] = _bias(n, heads, "heads")
  if c.qk_norm != "none":
    whole = c.qk_norm == "projection"
    for name, count in (("q_norm", c.n_heads), ("k_norm", c.n_kv_heads)):
      width = count * c.head_dim if whole else c.head_dim
      specs[name] = ParamSpec((n, width), ("layer", "heads"))
  return {**specs, **_around(c, n, c.n_heads * c.head_dim)}


def _latent(c: ModelConfig, n: int) -> dict[str, Any]:
  """Multi-head latent attention; a query head is [not rotated, rotated].

  `k_up` takes a query into the latents' space and `v_up` takes what was
  attended out of it, so that the cached latents are never expanded.
  """
  h, r, heads = c.n_heads, c.kv_rank, c.n_heads * c.query_width
  down = r + c.rope_dim
  specs: dict[str, Any] = {
    "kv_a": _matrix(n, c.d_model, down, "embed", "latent"),
    "kv_a_norm": ParamSpec((n, r), ("layer", "latent")),
    "k_up": ParamSpec(
      (n, h, c.nope_dim, r), ("layer", "heads", "head", "latent"), r
    ),
    "v_up": ParamSpec(
      (n, h, r, c.value_dim), ("layer", "heads", "latent", "head"), r
    ),
  }
  if c.attention_bias:
    specs["kv_a_bias"] = _bias(n, down, "latent")
  if c.q_rank:
    specs["q_a"] = _matrix(n, c.d_model, c.q_rank, "embed", "latent")
    specs["q_a_norm"] = ParamSpec((n, c.q_rank), ("layer", "latent"))
    specs["q_b"] = _matrix(n, c.q_rank, heads, "latent", "heads")
    if c.attention_bias:
      specs["q_a_bias"] = _bias(n, c.q_rank, "latent")
  else:
    specs["q"] = _matrix(n, c.d_model, heads, "embed", "heads")
  return {**specs, **_around(c, n, h * c.value_dim)}


def _around(c: ModelConfig, n: int, out: int) -> dict[str, Any]:
  """What both kinds of attention have before and after them."""
  specs = {
    "norm": ParamSpec((n, c.d_model), ("layer", "embed")),
    "out": _matrix(n, out, c.d_model, "heads", "embed"),
  }
  if c.attention_bias:
    specs["out_bias"] = _bias(n, c.d_model, "embed")
  if c.sinks:
    specs["sinks"] = _bias(n, c.n_heads, "heads")
  return specs


def _matrix(n: int, rows: int, columns: int, *axes: str) -> ParamSpec:
  return ParamSpec((n, rows, columns), ("layer", *axes), rows)


def _bias(n: int, width: int, axis: str, dtype: str = "") -> ParamSpec:
  return ParamSpec((n, width), ("layer", axis), width, dtype)


def _mlp(c: ModelConfig, n: int, width: int) -> dict[str, Any]:
  """SwiGLU with the gate's and the up projection's columns side by side."""
  return {
    "gate_up": _matrix(n, c.d_model, 2 * width, "embed", "mlp"),
    "down": _matrix(n, width, c.d_model, "mlp", "embed"),
  }


def _moe(c: ModelConfig, n: int) -> dict[str, Any]:
  """A MoE layer but for its routed experts."""
  e = c.n_experts
  moe: dict[str, Any] = {
    "router": _matrix(n, c.d_model, e, "embed", "logits")
  }
  if c.router_bias:
    moe["router_bias"] = _bias(n, e, "logits")
  if c.correction_bias:  # smaller than a bfloat16's step: always float32
    moe["correction_bias"] = _bias(n, e, "logits", "float32")
  if c.shared_width:
    moe["shared"] = _mlp(c, n, c.shared_width)
  return moe


def _experts(c: ModelConfig) -> dict[str, Any]:
  """The routed experts of all MoE layers: what a slot holds of one expert."""
  n, d, e, f = c.moe_layers, c.d_model, c.n_experts, c.expert_width
  lead = ("layer", "expert")
  experts = {
    "gate_up": ParamSpec((n, e, d, 2 * f), (*lead, "embed", "mlp"), d),
    "down": ParamSpec((n, e, f, d), (*lead, "mlp", "embed"), f),
  }
  if c.expert_bias:
    experts["gate_up_bias"] = ParamSpec((n, e, 2 * f), (*lead, "mlp"), d)
    experts["down_bias"] = ParamSpec((n, e, d), (*lead, "embed"), f)
  return experts


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
