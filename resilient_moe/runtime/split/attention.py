"""What an attention rank (AW) holds, and its steps."""

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.runtime import rank_arrays

Tree = dict[str, Any]
Programs = Mapping[str, Any]  # name -> jax.stages.Compiled
OnKV = Callable[[int, jax.Array], None]


class Wanted(NamedTuple):
  """What a step waits for; its arrays may still be computed."""

  layer: int
  h: jax.Array  # [N, D]
  experts: jax.Array  # [N, k]
  live: np.ndarray  # [N] bool

  def read(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Arguments of `ExpertsElsewhere.run`, waited for."""
    h, experts = np.asarray(self.h), np.asarray(self.experts)
    return self.layer, h, experts, self.live


class ExpertsElsewhere(Protocol):
  """What a step asks for its experts: `datapath.Exchange`."""

  def run(
    self, layer: int, h: np.ndarray, experts: np.ndarray, live: np.ndarray
  ) -> np.ndarray:
    """Each assignment's output, [N, k, D], unsummed; 0 where not `live`."""


class Step(NamedTuple):
  """A step that is computed and changes nothing until it is committed."""

  width: int
  ints: np.ndarray  # [1, .] the packed batch
  delta: jax.Array  # [L, 1, B + C, 2K, d]
  tokens: np.ndarray  # [1, B + 1] int32


class AttentionRank:
  """Dense weights and KV on one device; the experts are elsewhere."""

  def __init__(
    self, shape: InstanceShape, device: jax.Device, programs: Programs,
    dense: Tree,
  ) -> None:  # fmt: skip
    self.shape = shape
    self.device = device
    self.deleted = False
    self._programs = programs
    self._dense = rank_arrays.put_dense(dense, device)
    self._cache = rank_arrays.put_cache(shape, device)
    self._masked = self._put(np.zeros(shape.config.n_experts, bool))
    self._layers = [
      self._put(np.int32(i)) for i in range(shape.config.moe_layers)
    ]

  def mask(self, masked: np.ndarray) -> None:
    """Experts [E] bool that the gate doesn't choose."""
    self._masked = self._put(masked)

  def step(
    self, width: int, ints: np.ndarray, exchange: ExpertsElsewhere,
    on_kv: OnKV | None = None,
  ) -> Step:  # fmt: skip
    """Computes a step, waiting for the experts layer by layer.

    `on_kv` gets (first layer, new keys and values [l, N, 2K, d]) as soon as
    they are known.

    Raises:
      ExpertsUnreachable, ExchangeCancelled: the step is given up.
    """
    layers = self.layers(width, ints, on_kv)
    wanted = next(layers)
    while True:
      try:
        wanted = layers.send(exchange.run(*wanted.read()))
      except StopIteration as ended:
        step: Step = ended.value
        return step

  def layers(
    self, width: int, ints: np.ndarray, on_kv: OnKV | None = None
  ) -> Generator[Wanted, np.ndarray, Step]:
    """The same, asking whoever drives it for the experts' outputs."""
    run, options = self._programs, self.shape.config
    live = live_lanes(self.shape, width, ints)
    # NumPy's arrays go in as they are: a `device_put` each costs more.
    read = (self._dense, self._cache, self._masked, ints)
    at, kv = run[f"begin{width}"](*read)
    new = [kv]
    if on_kv is not None:
      on_kv(0, kv)
    for layer in range(options.moe_layers):
      y = yield Wanted(layer, at.h, at.chosen, live)
      if layer + 1 == options.moe_layers:
        break
      at, kv = run[f"go_on{width}"](
        *read, self._layers[layer + 1], at.x, at.gates, y
      )
      new.append(kv)
      if on_kv is not None:
        on_kv(options.dense_layers + layer + 1, kv)
    delta, tokens = run[f"finish{width}"](
      self._dense, ints, at.x, at.gates, y, tuple(new)
    )
    return Step(width, ints, delta, np.asarray(tokens))

  def commit(self, step: Step) -> None:
    """The step counts: its delta goes into the (donated) cache."""
    commit = self._programs[f"commit{step.width}"]
    self._cache = commit(self._cache, step.delta, step.ints)

  def read_row(self, row: int, tokens: int) -> np.ndarray:
    """KV of a request, [L, 2K, tokens, d], copied to the host."""
    return rank_arrays.read_row(self._cache, row, tokens)

  def write_row(self, row: int, kv: np.ndarray) -> None:
    """KV [L, 2K, tokens, d] into a row."""
    program = self._programs[f"commit{self.shape.options.chunk}"]
    self._cache = rank_arrays.write_row(
      self.shape, self._cache, program, row, kv, self.device
    )

  def warm(self) -> None:
    """Runs every program once, on idle rows, which no expert sees."""
    for width in self.shape.chunks():
      ints = rank_arrays.idle_batch(self.shape, 1, width)
      self.commit(self.step(width, ints, _Nobody()))
    self.wait()

  def wait(self) -> None:
    jax.block_until_ready(self._cache)

  def delete(self) -> None:
    """The rank is lost: any later use of its arrays is an error."""
    self.deleted = True
    for array in jax.tree.leaves((self._dense, self._cache, self._masked)):
      array.delete()

  def _put(self, array: Any) -> jax.Array:
    return jax.device_put(array, self.device)


class _Nobody:
  """The experts of idle rows."""

  def run(
    self, layer: int, h: np.ndarray, experts: np.ndarray, live: np.ndarray
  ) -> np.ndarray:
    del layer, live
    return np.zeros((*experts.shape, h.shape[1]), h.dtype)


def live_lanes(
  shape: InstanceShape, width: int, ints: np.ndarray
) -> np.ndarray:
  """Which lanes [N] of a packed step are tokens (`step.lanes`), bool."""
  b = shape.options.rows
  length = ints[0, 4 * b + 1]
  return np.concatenate([ints[0, b : 2 * b] >= 0, np.arange(width) < length])
