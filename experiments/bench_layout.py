"""A contiguous slot against gathered pages, for decode attention.

The same `attend` reads the cache in both; only where a block of keys and
values comes from differs. Pages of a whole block, and of 16 positions.
"""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_models as models
from experiments.bench_record import Cell, Result, paired, stat
from resilient_moe.mesh.executables import compiler_options
from resilient_moe.model.attention import Block, attend_blocks
from resilient_moe.model.config import ModelConfig, StepOptions

ROWS = 16  # sequences in the batch
PAGE = 16  # positions of a small page


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Times the attention of every layer of a decode step, interleaved."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  for name, model in settings.models.items():
    config = models.config_of(name, model, workdir)
    block = StepOptions(**model.options).kv_block
    for context in settings.contexts:
      options = StepOptions(rows=ROWS, max_len=context, kv_block=block)
      found = models.interleaved(
        {
          "slots": _slots(config, options, context),
          **{
            f"pages of {p}": _pages(config, options, context, p)
            for p in sorted({PAGE, block})
          },
        },
        settings.calls,
      )
      samples |= {f"{name}/{context}/{v}": s for v, s in found.items()}
      rows += _rows(name, context, found)
  note = (
    f"attention of all layers, {ROWS} sequences on one device; pages are "
    "scattered at random over the pool"
  )
  return Result("layout", rows, samples, (), (note,))


def _rows(
  name: str, context: int, found: dict[str, list[float]]
) -> list[dict[str, Cell]]:
  rows: list[dict[str, Cell]] = []
  for layout, seconds in found.items():
    ratio = stat(paired(seconds, found["slots"]))
    rows.append({
      "model": name, "context": context, "layout": layout,
      "ms": 1e3 * stat(seconds).median, "against slots": ratio.median,
      "low": ratio.low, "high": ratio.high,
    })  # fmt: skip
  return rows


def _slots(
  config: ModelConfig, options: StepOptions, context: int
) -> Callable[[], None]:
  """Each sequence's positions lie side by side: [L, B, 2K, T, d]."""
  size, heads = options.kv_block, 2 * config.n_kv_heads
  shape = (config.n_layers, ROWS, heads, options.cache_len, config.head_dim)

  def read(cache: jax.Array, table: jax.Array, layer: jax.Array) -> Block:
    del table

    def block(j: jax.Array) -> jax.Array:
      cut = (1, ROWS, heads, size, config.head_dim)
      at = (layer, 0, 0, j * size, 0)
      return jax.lax.dynamic_slice(cache, at, cut)[0]

    return block

  table = np.zeros((ROWS, 1), np.int32)
  return _call(config, options, context, read, shape, table)


def _pages(
  config: ModelConfig, options: StepOptions, context: int, page: int
) -> Callable[[], None]:
  """A pool of pages and each sequence's table: [L, P, 2K, p, d]."""
  size, heads, d = options.kv_block, 2 * config.n_kv_heads, config.head_dim
  count = options.cache_len // page
  shape = (config.n_layers, ROWS * count, heads, page, d)
  each = size // page

  def read(cache: jax.Array, table: jax.Array, layer: jax.Array) -> Block:
    def block(j: jax.Array) -> jax.Array:
      of = jax.lax.dynamic_slice(table, (0, j * each), (ROWS, each))
      found = cache[layer, of]  # [B, each, 2K, page, d]
      return jnp.moveaxis(found, 1, 2).reshape(ROWS, heads, size, d)

    return block

  rng = np.random.default_rng(0)
  table = rng.permutation(ROWS * count).astype(np.int32)
  return _call(config, options, context, read, shape, table.reshape(ROWS, -1))


def _call(
  config: ModelConfig,
  options: StepOptions,
  context: int,
  read: Callable,
  cache_shape: tuple[int, ...],
  table: np.ndarray,
) -> Callable[[], None]:
  """A compiled call of every layer's decode attention."""
  heads, d = config.n_heads, config.head_dim
  rng = np.random.default_rng(0)
  q = rng.standard_normal((ROWS, 1, heads, d), np.float32)
  kv = rng.standard_normal((ROWS, 1, 2 * config.n_kv_heads, d), np.float32)
  start = np.full(ROWS, context - 1, np.int32)
  cache = rng.standard_normal(cache_shape, np.float32)

  def layers(
    q: jax.Array, kv: jax.Array, start: jax.Array, cache: jax.Array,
    table: jax.Array,
  ) -> jax.Array:  # fmt: skip
    def one(layer: jax.Array, out: jax.Array) -> jax.Array:
      return attend_blocks(
        q + out, kv, start, jnp.ones_like(start), read(cache, table, layer),
        options,
      )  # fmt: skip

    return jax.lax.fori_loop(0, config.n_layers, one, jnp.zeros_like(q))

  arguments = jax.device_put((q, kv, start, cache, table))
  lowered = jax.jit(layers).lower(*arguments)
  compiled = lowered.compile(compiler_options=compiler_options())
  return lambda: jax.block_until_ready(compiled(*arguments))
