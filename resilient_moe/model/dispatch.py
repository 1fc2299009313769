"""Dispatch and combine: how tokens reach the experts and come back.

Every strategy is a function `exchange(experts, layer, x, slots) -> y` on one
rank of the mesh axis `ep`:

  experts  gate_up [L, S, D, 2F], down [L, S, F, D], ...: this rank's slots
  layer    int32, which of the L
  x        [N, D] this rank's tokens
  slots    [N, k] int32 physical slots, rank * S + slot; -1: no expert
  y        [N, k, D] each expert's output, unsummed; zero where slots is -1

No token is ever dropped. The k outputs come back unsummed and the caller adds
them in a fixed order, so results don't depend on the number of ranks, the
placement of the experts, or which replica served.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.experts import Kernel, kernel_of

Exchange = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]

AXIS = "ep"  # the expert-parallel mesh axis


def make_exchange(
  config: ModelConfig, options: StepOptions, n_ranks: int
) -> Exchange:
  """The strategy that `options.dispatch` names, for a mesh of `n_ranks`."""
  kernel = kernel_of(config, options)
  if n_ranks == 1:
    return _local(kernel)
  if options.dispatch == "all_gather":
    return _all_gather(kernel, n_ranks)
  return _all_to_all(kernel, n_ranks)


def _local(kernel: Kernel) -> Exchange:
  def exchange(
    experts: Any, layer: jax.Array, x: jax.Array, slots: jax.Array
  ) -> jax.Array:
    n, k = slots.shape
    held = experts["down"].shape[1]
    flat = jnp.where(slots >= 0, slots, held).reshape(-1)
    token = jnp.arange(n * k, dtype=jnp.int32) // k
    y = kernel(experts, layer, x, token, flat)
    return y.reshape(n, k, -1)

  return exchange


def _all_gather(kernel: Kernel, n_ranks: int) -> Exchange:
  """Everybody sees every token, computes its own experts, scatters back.

  The reduce-scatter adds zeros to the one rank's contribution, so it is exact
  (`jax_facts.md`: reduce-scatter of the *unsummed* [T, k, D]).
  """

  def exchange(
    experts: Any, layer: jax.Array, x: jax.Array, slots: jax.Array
  ) -> jax.Array:
    n, k = slots.shape
    held = experts["down"].shape[1]
    me = jax.lax.axis_index(AXIS)
    everyone = jax.lax.all_gather(x, AXIS, tiled=True)  # [R * N, D]
    flat = jax.lax.all_gather(slots.reshape(-1), AXIS, tiled=True)
    mine = (flat >= 0) & (flat // held == me)
    local = jnp.where(mine, flat % held, held)
    token = jnp.arange(n_ranks * n * k, dtype=jnp.int32) // k
    y = kernel(experts, layer, everyone, token, local)
    y = jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)
    return y.reshape(n, k, -1)

  return exchange


def round_size(n: int, k: int, held: int, n_ranks: int) -> int:
  """Rows that one all-to-all carries from a rank to a peer.

  Small steps are sized for the worst case and need one round. Large ones get
  twice the even share and as many rounds as the fullest pair needs.
  """
  worst = n * min(k, held)
  if worst <= 64:
    return worst
  return min(worst, max(32, -(-2 * n * k // n_ranks)))


def _all_to_all(kernel: Kernel, n_ranks: int) -> Exchange:
  """Tokens travel to their experts' ranks, in as many rounds as they need."""

  def exchange(
    experts: Any, layer: jax.Array, x: jax.Array, slots: jax.Array
  ) -> jax.Array:
    n, k = slots.shape
    held = experts["down"].shape[1]
    size = round_size(n, k, held, n_ranks)
    flat = slots.reshape(-1)
    to = jnp.where(flat >= 0, flat // held, n_ranks)
    order = jnp.argsort(to, stable=True).astype(jnp.int32)
    counts = (to[:, None] == jnp.arange(n_ranks)[None, :]).sum(axis=0)
    starts = (jnp.cumsum(counts) - counts).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(
      jnp.arange(n * k, dtype=jnp.int32)
    )
    place = place - starts[jnp.minimum(to, n_ranks - 1)]  # rank within a peer

    def one_round(first: jax.Array, y: jax.Array) -> jax.Array:
      at = first + jnp.arange(size, dtype=jnp.int32)[None, :]
      row = order[jnp.minimum(starts[:, None] + at, n * k - 1)]  # [R, size]
      real = at < counts[:, None]
      slot = jnp.where(real, flat[row] % held, held).reshape(-1)
      got, slot = _send(x[(row // k).reshape(-1)], slot)
      token = jnp.arange(n_ranks * size, dtype=jnp.int32)
      done = kernel(experts, layer, got, token, slot)
      back = jax.lax.all_to_all(done, AXIS, 0, 0, tiled=True)
      here = (flat >= 0) & (place >= first) & (place < first + size)
      index = jnp.minimum(to, n_ranks - 1) * size + place - first
      index = jnp.clip(index, 0, n_ranks * size - 1)
      return jnp.where(here[:, None], back[index], y)

    y = jnp.zeros((n * k, x.shape[1]), x.dtype)
    if size >= n * min(k, held):
      y = one_round(jnp.int32(0), y)
    else:
      most = jax.lax.pmax(counts.max().astype(jnp.int32), AXIS)
      rounds = (most + size - 1) // size
      y = jax.lax.fori_loop(
        0, rounds, lambda r, y: one_round(r * size, y), y
      )
    return y.reshape(n, k, -1)

  return exchange


def _send(rows: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rows [R * size, D] and their slots, exchanged in one collective.

  The slot rides as one more column: as a float32 it is exact to 2^24.
  """
  if rows.dtype != jnp.float32:
    send = lambda a: jax.lax.all_to_all(a, AXIS, 0, 0, tiled=True)
    return send(rows), send(slot)
  packed = jnp.concatenate([rows, slot.astype(rows.dtype)[:, None]], axis=1)
  packed = jax.lax.all_to_all(packed, AXIS, 0, 0, tiled=True)
  return packed[:, :-1], packed[:, -1].astype(jnp.int32)
