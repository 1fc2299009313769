"""The experts' arithmetic: rows grouped by slot, computed in small blocks.

Cost grows with the rows, not with the experts held (`jax_facts.md`, "Expert
matmul in plain XLA"): rows are sorted by slot, each slot's rows are padded to
whole blocks, and a loop visits the blocks that exist.
"""

from typing import Any

import jax
import jax.numpy as jnp


def swiglu(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
  """SwiGLU: [N, D], [D, 2F], [F, D] -> [N, D]."""
  gate, up = jnp.split(x @ gate_up, 2, axis=-1)
  return (jax.nn.silu(gate) * up) @ down


def block_size(n: int, fixed: int) -> int:
  """Rows of a block for `n` assignments: small for decode, 32 for prefill."""
  return fixed or (8 if n <= 128 else 32)


def _plan(slots: jax.Array, n_slots: int, block: int) -> tuple:
  """Sorts rows by slot: (order [M], first row and first block per slot)."""
  order = jnp.argsort(slots, stable=True).astype(jnp.int32)
  sizes = (slots[:, None] == jnp.arange(n_slots)[None, :]).sum(axis=0)
  sizes = sizes.astype(jnp.int32)
  blocks = (sizes + block - 1) // block
  block_ends = jnp.cumsum(blocks)
  row_ends = jnp.cumsum(sizes)
  return order, row_ends - sizes, row_ends, block_ends - blocks, block_ends


def _rows_of(i: Any, plan: tuple, block: int) -> tuple[jax.Array, jax.Array]:
  """The slot of block `i` and its rows [block]; M stands for "no row"."""
  order, row_start, row_end, block_start, block_ends = plan
  slot = (block_ends <= i).sum().astype(jnp.int32)
  slot = jnp.minimum(slot, row_end.shape[0] - 1)
  at = row_start[slot] + (i - block_start[slot]) * block
  at = at + jnp.arange(block, dtype=jnp.int32)
  m = order.shape[0]
  rows = jnp.where(at < row_end[slot], order[jnp.minimum(at, m - 1)], m)
  return slot, rows


def run_blocks(
  experts: dict[str, jax.Array],  # gate_up [L, S, D, 2F], down [L, S, F, D]
  layer: jax.Array,
  x: jax.Array,  # [T, D]
  token: jax.Array,  # [M] int32 row of `x` of each assignment
  slots: jax.Array,  # [M] int32 slot of each assignment; S: none
  fixed_block: int = 0,
) -> jax.Array:
  """Each assignment's expert output, [M, D]; zero where the slot is S.

  A dynamic number of blocks: no reverse-mode gradient. Under `vmap` one
  rank's loop runs after the other.
  """
  call = jax.custom_batching.sequential_vmap(
    lambda e, i, x, t, s: _run_blocks(e, i, x, t, s, fixed_block)
  )
  return call(experts, layer, x, token, slots)


def _run_blocks(
  experts: dict[str, jax.Array],
  layer: jax.Array,
  x: jax.Array,
  token: jax.Array,
  slots: jax.Array,
  fixed_block: int,
) -> jax.Array:
  m = slots.shape[0]
  gate_up, down = experts["gate_up"], experts["down"]
  block = block_size(m, fixed_block)
  plan = _plan(slots, gate_up.shape[1], block)

  def weights(stack: jax.Array, slot: jax.Array) -> jax.Array:
    start = (layer, slot, 0, 0)
    return jax.lax.dynamic_slice(stack, start, (1, 1, *stack.shape[2:]))[0, 0]

  def body(i: jax.Array, y: jax.Array) -> jax.Array:
    slot, rows = _rows_of(i, plan, block)
    xb = x[token[jnp.minimum(rows, m - 1)]]
    yb = swiglu(xb, weights(gate_up, slot), weights(down, slot))
    return y.at[rows].set(yb, mode="drop", unique_indices=False)

  y = jnp.zeros((m, x.shape[1]), x.dtype)
  return jax.lax.fori_loop(0, plan[-1][-1], body, y)


def run_static(
  experts: dict[str, jax.Array],
  layer: jax.Array,
  x: jax.Array,
  token: jax.Array,
  slots: jax.Array,
  fixed_block: int = 0,
) -> jax.Array:
  """As `run_blocks`, with as many blocks as there can be: differentiable."""
  m = slots.shape[0]
  gate_up, down = experts["gate_up"][layer], experts["down"][layer]
  n_slots = gate_up.shape[0]
  block = fixed_block or max(8, min(128, m // n_slots))
  plan = _plan(slots, n_slots, block)
  count = -(-m // block) + n_slots
  index = jnp.arange(count, dtype=jnp.int32)
  slot, rows = jax.vmap(lambda i: _rows_of(i, plan, block))(index)
  exists = (index < plan[-1][-1])[:, None]
  rows = jnp.where(exists, rows, m)
  xb = x[token[jnp.minimum(rows, m - 1)]]  # [count, block, D]
  yb = jax.vmap(swiglu)(xb, gate_up[slot], down[slot])
  y = jnp.zeros((m + 1, x.shape[1]), x.dtype)
  return y.at[rows].set(yb, mode="drop")[:m]


KERNELS = {"blocks": run_blocks, "static": run_static}
