"""The KV cache is neither copied whole nor reallocated by a step."""

import jax
import numpy as np
import pytest

from resilient_moe.mesh import programs
from resilient_moe.mesh.executables import compiler_options
from resilient_moe.model.step import cache_shape
from tests.mesh import shapes

LONG = 8192  # positions of a slot, of which a step uses 20


def on_device(shape: programs.InstanceShape, chunk: int) -> tuple:
  """A rank's cache, a delta and a batch."""
  _, cache, _, ints = shapes.values(shape, 1, chunk)
  width = shape.options.rows + chunk
  delta = np.ones((2, 1, width, *_heads(shape)), np.float32)
  return jax.device_put((cache, delta, ints), jax.devices()[0])


def _heads(shape: programs.InstanceShape) -> tuple[int, int]:
  return 2 * shape.config.n_kv_heads, shape.config.head_dim


@pytest.mark.parametrize("chunk", [0, 8])
def test_commit_writes_into_the_same_memory(chunk):
  shape = shapes.instance()
  lowered = programs.lower_rank_programs(shape, jax.devices()[0])
  commit = lowered[f"commit{chunk}"]().compile()
  cache, delta, ints = on_device(shape, chunk)
  cache = commit(cache, delta, ints)  # was NumPy's memory, maybe
  pointer = cache.unsafe_buffer_pointer()
  for _ in range(2):
    before = cache
    cache = commit(cache, delta, ints)
    assert before.is_deleted()
    assert cache.unsafe_buffer_pointer() == pointer
  assert (np.asarray(cache) == 1).any()


@pytest.mark.parametrize(("chunk", "ids"), [(0, (0,)), (8, (0, 1))])
def test_step_needs_no_memory_for_the_cache_that_is_not_used(chunk, ids):
  """What a step allocates is nothing beside the cache that it reads."""
  shape = shapes.instance(max_len=LONG)
  lowered = programs.lower_step(shape, shapes.devices(*ids), chunk)
  compiled = lowered.compile(compiler_options=compiler_options())
  memory = compiled.memory_analysis()
  size = np.prod(cache_shape(shape.config, shape.options)) * 4
  assert memory.argument_size_in_bytes > size
  used = memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert used < 0.05 * size


@pytest.mark.parametrize("chunk", [0, 8])
def test_commit_needs_no_memory_for_it_either(chunk):
  shape = shapes.instance(max_len=LONG)
  lowered = programs.lower_rank_programs(shape, jax.devices()[0])
  memory = lowered[f"commit{chunk}"]().compile().memory_analysis()
  size = np.prod(cache_shape(shape.config, shape.options)) * 4
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < 0.05 * size
