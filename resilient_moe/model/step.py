"""One serving step on one rank: reads the cache, returns a delta.

The step never writes the cache (DESIGN 2.2): it returns the keys and values
of the tokens it processed, and `commit_*` scatters them into the donated
cache once everybody agrees that the step counts. A step carries `B` decode
rows, row b being KV slot b, and, in its wide form, a chunk of `C` prompt
tokens of one request.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resilient_moe.model.attention import Cached, Reach, attend
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.dispatch import AXIS, make_exchange
from resilient_moe.model.forward import unembed
from resilient_moe.model.layers import Attend, run_layers
from resilient_moe.model.sampling import sample

Tree = dict[str, Any]
CHUNK_FIELDS = 5  # start, length, row, seed, temperature


def cache_shape(config: ModelConfig, options: StepOptions) -> tuple[int, ...]:
  """KV cache of one rank, [L, 1, B, heads, T, w]; axis 1 is the rank axis.

  `heads` and `w` are the config's `kv_heads` and `kv_width`: 2K heads of keys
  and values, [2K, d], or one latent. Docstrings say [2K, d] for either.

  Head-major slots: `jax_facts.md` has them 4 times faster than token-major,
  and a contiguous slot 2 times faster than gathered pages at context 256.
  """
  return (
    config.n_layers, 1, options.rows, config.kv_heads, options.cache_len,
    config.kv_width,
  )  # fmt: skip


def request_kv_shape(
  config: ModelConfig, options: StepOptions
) -> tuple[int, int, int, int]:
  """KV of one request, [L, 2K, T, d]: a row of `cache_shape`."""
  n_layers, _, _, heads, length, d = cache_shape(config, options)
  return n_layers, heads, length, d


def batch_width(options: StepOptions, chunk: int) -> int:
  """Int32 fields that describe one rank's part of a step."""
  return 4 * options.rows + CHUNK_FIELDS + chunk


def pack(
  decode: np.ndarray,  # [R, B, 3] int32 token, position (-1: idle), seed
  decode_temperature: np.ndarray,  # [R, B] float32
  chunk: np.ndarray,  # [R, C] int32 prompt tokens; C = 0: a decode step
  chunk_fields: np.ndarray,  # [R, 4] int32 start, length, row, seed
  chunk_temperature: np.ndarray,  # [R] float32
) -> np.ndarray:
  """Everything a step needs to know, as one int32 array [R, width].

  One transfer a step; temperatures travel as their bits.
  """
  bits = lambda x: x.astype(np.float32).view(np.int32)
  parts = [decode[:, :, i] for i in range(3)]
  parts += [bits(decode_temperature), chunk_fields]
  parts += [bits(chunk_temperature)[:, None], chunk]
  return np.concatenate(parts, axis=1).astype(np.int32)


def unpack(options: StepOptions, ints: jax.Array) -> tuple[Tree, Tree]:
  """The decode rows' fields and the chunk's, of one rank's [width]."""
  b = options.rows
  rows = {
    "token": ints[:b],
    "position": ints[b : 2 * b],
    "seed": ints[2 * b : 3 * b],
    "temperature": jax.lax.bitcast_convert_type(
      ints[3 * b : 4 * b], jnp.float32
    ),
  }
  f = ints[4 * b : 4 * b + CHUNK_FIELDS]
  chunk = {
    "start": f[0],
    "length": f[1],
    "row": f[2],
    "seed": f[3],
    "temperature": jax.lax.bitcast_convert_type(f[4], jnp.float32),
    "tokens": ints[4 * b + CHUNK_FIELDS :],
  }
  return rows, chunk


def rank_step(
  config: ModelConfig,
  options: StepOptions,
  n_ranks: int,
  params: Tree,  # experts [L, 1, S, ...]: this rank's slots
  cache: jax.Array,  # [L, 1, B, 2K, T, d]
  routing: Tree,  # see `routing_arrays`
  ints: jax.Array,  # [1, width] from `pack`
) -> tuple[jax.Array, jax.Array]:
  """Runs on each member of the axis `ep`.

  Returns:
    delta [L, 1, B + C, 2K, d]: new keys and values, in the step's order.
    tokens [1, B + 1] int32: sampled tokens of the decode rows and of the
    chunk's last position; they mean nothing for idle rows.
  """
  rows, chunk = unpack(options, ints[0])
  tokens, live, at = lanes(rows, chunk)

  def to_slots(layer: jax.Array, chosen: jax.Array) -> jax.Array:
    del layer  # a slot holds its expert's weights of all layers
    me = jax.lax.axis_index(AXIS)
    token = jnp.arange(chosen.shape[0], dtype=jnp.int32)
    copies = jnp.maximum(routing["copies"][chosen], 1)
    copy = (me + token)[:, None] % copies  # spreads load over the replicas
    slots = routing["table"][chosen, copy]
    return jnp.where(live[:, None], slots, -1)

  x, delta, _ = run_layers(
    config, options, _squeeze_experts(params), params["embed"][tokens], at,
    routing["masked"], attend_cached(options, cache[:, 0], rows, chunk),
    make_exchange(config, options, n_ranks), to_slots,
  )  # fmt: skip
  sampled = sample_lanes(config, options, params, x, rows, chunk)
  return delta[:, None], sampled[None]


def lanes(rows: Tree, chunk: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A step's lanes, decode rows first: tokens, live, positions, all [N]."""
  lane = jnp.arange(chunk["tokens"].shape[0], dtype=jnp.int32)
  tokens = jnp.concatenate([rows["token"], chunk["tokens"]])
  live = jnp.concatenate([rows["position"] >= 0, lane < chunk["length"]])
  at = jnp.concatenate(
    [jnp.maximum(rows["position"], 0), chunk["start"] + lane]
  )
  return tokens, live, at


def sample_lanes(
  config: ModelConfig,
  options: StepOptions,
  params: Tree,
  x: jax.Array,  # [N, D] after the last layer
  rows: Tree,
  chunk: Tree,
) -> jax.Array:
  """Sampled tokens of the decode rows and of the chunk's end, [B + 1]."""
  last = options.rows + jnp.maximum(chunk["length"] - 1, 0)
  if chunk["tokens"].shape[0]:
    x_last = jnp.concatenate([x[: options.rows], x[last][None]])
  else:
    x_last = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])
  logits = unembed(config, options, params, x_last)
  return sample(
    logits,
    jnp.append(rows["seed"], chunk["seed"]),
    jnp.append(rows["position"], chunk["start"] + chunk["length"] - 1) + 1,
    jnp.append(rows["temperature"], chunk["temperature"]),
  )


def _squeeze_experts(params: Tree) -> Tree:
  """Drops the rank axis of the expert stacks, [L, 1, S, ...]."""
  experts = jax.tree.map(lambda x: x[:, 0], params["experts"])
  return {**params, "experts": experts}


def attend_cached(
  options: StepOptions, cache: jax.Array, rows: Tree, chunk: Tree
) -> Attend:
  """Decode rows attend their own slots, the chunk attends its request's."""
  b = options.rows
  position = rows["position"]
  start = jnp.maximum(position, 0)
  length = (position >= 0).astype(jnp.int32)

  def attend_step(
    layer: jax.Array, q: jax.Array, kv: jax.Array, reach: Reach
  ) -> jax.Array:
    own = Cached(cache, layer, jnp.int32(0))
    out = attend(
      q[:b, None], kv[:b, None], start, length, own, options, reach
    )[:, 0]
    if q.shape[0] == b:
      return out
    wide = attend(
      q[None, b:], kv[None, b:], chunk["start"][None],
      chunk["length"][None], Cached(cache, layer, chunk["row"]), options,
      reach,
    )[0]  # fmt: skip
    return jnp.concatenate([out, wide])

  return attend_step


def routing_arrays(
  entries: np.ndarray, mesh: np.ndarray, slots_per_rank: int, masked: np.ndarray
) -> Tree:
  """The routing table as the step's argument.

  Args:
    entries: [E, C, 2] (rank, slot) of each copy; -1 pads.
    mesh: [R] ranks in mesh order.
    slots_per_rank: S.
    masked: [E] bool.

  Returns:
    table [E, C] int32 physical slots, copies [E] int32, masked [E] bool.
  """
  place = np.full(int(mesh.max()) + 1, -1, np.int32)
  place[mesh] = np.arange(len(mesh), dtype=np.int32)
  rank, slot = entries[:, :, 0], entries[:, :, 1]
  physical = place[np.maximum(rank, 0)] * slots_per_rank + slot
  return {
    "table": np.where(rank >= 0, physical, -1).astype(np.int32),
    "copies": (rank >= 0).sum(axis=1).astype(np.int32),
    "masked": masked.astype(bool),
  }


def commit_rows(
  options: StepOptions, cache: jax.Array, delta: jax.Array, ints: jax.Array
) -> jax.Array:
  """Scatters the decode rows' delta into the (donated) cache of one rank."""
  b = options.rows
  position = ints[0, b : 2 * b]
  position = jnp.where(position >= 0, position, cache.shape[4])  # dropped
  new = jnp.moveaxis(delta[:, 0, :b], 1, 0)  # [B, L, 2K, d]
  row = jnp.arange(b)
  return cache.at[:, 0, row, :, position, :].set(new, mode="drop")


def commit_chunk(
  options: StepOptions, cache: jax.Array, delta: jax.Array, ints: jax.Array
) -> jax.Array:
  """Writes the chunk's delta behind its start, after the decode rows'.

  The chunk's whole width is written: what lies behind its length is behind
  the request's last position and is overwritten before it is read.
  """
  _, chunk = unpack(options, ints[0])
  cache = commit_rows(options, cache, delta, ints)
  new = jnp.swapaxes(delta[:, 0, options.rows :], 1, 2)[:, None, None]
  zero = jnp.int32(0)
  index = (zero, zero, chunk["row"], zero, chunk["start"], zero)
  old = jax.lax.dynamic_slice(cache, index, new.shape)
  new = jnp.where(chunk["length"] > 0, new, old)
  return jax.lax.dynamic_update_slice(cache, new, index)
