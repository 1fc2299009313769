"""The experts' arithmetic: rows grouped by slot, computed in small blocks.

Cost grows with the rows, not with the experts held (`jax_facts.md`, "Expert
matmul in plain XLA"): rows are sorted by slot, each slot's rows are padded to
whole blocks, and a loop visits the slots that have rows, and their blocks. A
slot's weights are copied out of the stack once, however many blocks it has.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from resilient_moe.model import native
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.products import either

# (experts, layer, x, token, slots) -> y, see `run_blocks`
Kernel = Callable[..., jax.Array]
# gate and up projection [N, F] both -> [N, F]
Activation = Callable[[jax.Array, jax.Array], jax.Array]


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Shazeer, "GLU variants improve transformer", 2020."""
  return jax.nn.silu(gate) * up


def activation_of(config: ModelConfig) -> Activation:
  """The activation that a config names."""
  if config.activation == "swiglu":
    return swiglu
  limit, alpha = config.swiglu_limit, config.swiglu_alpha

  def clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss's, whose up projection is biased by one."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * (gate * jax.nn.sigmoid(alpha * gate))

  return clamped


def mlp(
  activation: Activation,
  x: jax.Array,  # [N, D]
  gate_up: jax.Array,  # [D, 2F] the gate's columns, then the up projection's
  down: jax.Array,  # [F, D]
  gate_up_bias: jax.Array | None = None,  # [2F]
  down_bias: jax.Array | None = None,  # [D]
  matmul: Any = jnp.matmul,  # (x [N, K], w [K, M]) -> [N, M]
) -> jax.Array:
  """A gated MLP, one expert's or a dense one: [N, D]."""
  hidden = matmul(x, gate_up)
  if gate_up_bias is not None:
    hidden = hidden + gate_up_bias[None, :]
  y = matmul(activation(*jnp.split(hidden, 2, axis=-1)), down)
  return y if down_bias is None else y + down_bias[None, :]


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
  _, _, row_end, block_start, block_ends = plan
  slot = (block_ends <= i).sum().astype(jnp.int32)
  slot = jnp.minimum(slot, row_end.shape[0] - 1)
  return slot, _rows_in(slot, i - block_start[slot], plan, block)


def _rows_in(slot: Any, j: Any, plan: tuple, block: int) -> jax.Array:
  """The rows [block] of a slot's block `j`; M stands for "no row"."""
  order, row_start, row_end, *_ = plan
  at = row_start[slot] + j * block + jnp.arange(block, dtype=jnp.int32)
  m = order.shape[0]
  return jnp.where(at < row_end[slot], order[jnp.minimum(at, m - 1)], m)


def run_blocks(
  experts: dict[str, jax.Array],  # [L, S, ...], see `params.describe`
  layer: jax.Array,
  x: jax.Array,  # [T, D]
  token: jax.Array,  # [M] int32 row of `x` of each assignment
  slots: jax.Array,  # [M] int32 slot of each assignment; S: none
  fixed_block: int = 0,
  activation: Activation = swiglu,
) -> jax.Array:
  """Each assignment's expert output, [M, D]; zero where the slot is S.

  A dynamic number of blocks: no reverse-mode gradient. Under `vmap` one
  rank's loop runs after the other.
  """
  call = jax.custom_batching.sequential_vmap(
    lambda e, i, x, t, s: _run_blocks(e, i, x, t, s, fixed_block, activation)
  )
  return call(experts, layer, x, token, slots)


def _run_blocks(
  experts: dict[str, jax.Array],
  layer: jax.Array,
  x: jax.Array,
  token: jax.Array,
  slots: jax.Array,
  fixed_block: int,
  activation: Activation,
) -> jax.Array:
  m = slots.shape[0]
  block = block_size(m, fixed_block)
  plan = _plan(slots, experts["down"].shape[1], block)
  blocks = plan[4] - plan[3]  # of each slot
  used = jnp.argsort(blocks == 0, stable=True).astype(jnp.int32)

  def weights(stack: jax.Array, slot: jax.Array) -> jax.Array:
    start = (layer, slot) + (0,) * (stack.ndim - 2)
    return jax.lax.dynamic_slice(stack, start, (1, 1, *stack.shape[2:]))[0, 0]

  def body(i: jax.Array, y: jax.Array) -> jax.Array:
    slot = used[i]
    one = {name: weights(stack, slot) for name, stack in experts.items()}

    def one_block(j: jax.Array, y: jax.Array) -> jax.Array:
      rows = _rows_in(slot, j, plan, block)
      xb = x[token[jnp.minimum(rows, m - 1)]]
      yb = mlp(activation, xb, **one)
      return y.at[rows].set(yb, mode="drop", unique_indices=False)

    return jax.lax.fori_loop(0, blocks[slot], one_block, y)

  y = jnp.zeros((m, x.shape[1]), x.dtype)
  n_used = (blocks > 0).sum().astype(jnp.int32)
  return jax.lax.fori_loop(0, n_used, body, y)


def run_static(
  experts: dict[str, jax.Array],
  layer: jax.Array,
  x: jax.Array,
  token: jax.Array,
  slots: jax.Array,
  fixed_block: int = 0,
  activation: Activation = swiglu,
) -> jax.Array:
  """As `run_blocks`, with as many blocks as there can be: differentiable."""
  m = slots.shape[0]
  held = {name: stack[layer] for name, stack in experts.items()}
  n_slots = held["down"].shape[0]
  block = fixed_block or max(8, min(128, m // n_slots))
  plan = _plan(slots, n_slots, block)
  count = -(-m // block) + n_slots
  index = jnp.arange(count, dtype=jnp.int32)
  slot, rows = jax.vmap(lambda i: _rows_of(i, plan, block))(index)
  exists = (index < plan[-1][-1])[:, None]
  rows = jnp.where(exists, rows, m)
  xb = x[token[jnp.minimum(rows, m - 1)]]  # [count, block, D]
  one = {name: stack[slot] for name, stack in held.items()}
  yb = jax.vmap(lambda x, w: mlp(activation, x, **w))(xb, one)
  y = jnp.zeros((m + 1, x.shape[1]), x.dtype)
  return y.at[rows].set(yb, mode="drop")[:m]


KERNELS = {"blocks": run_blocks, "static": run_static}


def kernel_of(config: ModelConfig, options: StepOptions) -> Kernel:
  """The kernel that the options name; native where that can be."""
  run = functools.partial(
    KERNELS[options.experts],
    fixed_block=options.expert_block,
    activation=activation_of(config),
  )
  if options.experts != "blocks":
    return run
  clamped = config.activation != "swiglu"
  compiled = functools.partial(
    native.experts,
    limit=config.swiglu_limit if clamped else 0.0,
    alpha=config.swiglu_alpha if clamped else 1.0,
  )

  def kernel(
    experts: dict[str, jax.Array],
    layer: jax.Array,
    x: jax.Array,
    token: jax.Array,
    slots: jax.Array,
  ) -> jax.Array:
    args = experts, layer, x, token, slots
    floats = (x, *experts.values())
    return either(options, floats, lambda: compiled(*args), lambda: run(*args))

  return kernel
