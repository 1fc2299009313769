"""The two sides of the benchmark against `transformers`, on equal weights.

Both decode greedily: a side takes a token and gives the next one. Ours is what
an engine of one rank runs: the step program as it is compiled there (sampling
included), waited for, and the commit of its delta.
"""

import copy
from typing import Any

import jax
import numpy as np

from resilient_moe.mesh.executables import Executables
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.model.checkpoint import split_experts
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.step import pack, routing_arrays
from resilient_moe.runtime.device_store import DeviceStore

MESH = (0,)


class Ours:
  """An engine's step and commit on one device."""

  def __init__(
    self, config: ModelConfig, params: Any, options: StepOptions
  ) -> None:
    self.options, n = options, config.n_experts
    shape = InstanceShape(config, options, n, 1)
    host = split_experts(config, jax.tree.map(np.asarray, params))
    experts = [host["experts"][name] for name in sorted(host["experts"])]
    self.store = DeviceStore(shape, jax.devices()[:1], Executables(shape))
    self.store.add(0, host["dense"], experts)
    self.mask(np.zeros(n, bool))

  def mask(self, masked: np.ndarray) -> None:
    """Hides experts [E] from the gate."""
    n = len(masked)
    entries = np.stack([np.zeros(n, np.int32), np.arange(n)], axis=1)
    routing = routing_arrays(
      entries[:, None].astype(np.int32), np.array(MESH), n, masked
    )
    self._routing = self.store.put_routing(MESH, routing)

  def prefill(self, row: int, prompt: np.ndarray) -> int:
    """A prompt [T] into a KV row, chunk by chunk; the token after it."""
    width = self.options.chunk
    for start in range(0, len(prompt), width):
      part = prompt[start : start + width]
      chunk = np.zeros((1, width), np.int32)
      chunk[0, : len(part)] = part
      fields = np.array([[start, len(part), row, 0]], np.int32)
      idle = np.full((1, self.options.rows, 3), -1, np.int32)
      idle[:, :, 0] = 0
      tokens = self._step(width, idle, chunk, fields)
    return int(tokens[-1])

  def decode(self, tokens: np.ndarray, position: int) -> np.ndarray:
    """A token [B] of every row at one position; the next ones [B]."""
    rows = np.zeros((1, self.options.rows, 3), np.int32)
    rows[0, :, 0], rows[0, :, 1] = tokens, position
    nothing = np.zeros((1, 0), np.int32), np.zeros((1, 4), np.int32)
    return self._step(0, rows, *nothing)[:-1]

  def _step(
    self, width: int, rows: np.ndarray, chunk: np.ndarray, fields: np.ndarray
  ) -> np.ndarray:
    greedy = np.zeros((1, self.options.rows), np.float32)
    batch = pack(rows, greedy, chunk, fields, np.zeros(1, np.float32))
    delta, tokens, packed = self.store.run(MESH, width, self._routing, batch)
    self.store.commit(MESH, width, delta, packed)
    return tokens[0]

  def wait(self) -> None:
    """Until the last commit is done."""
    self.store.wait()


class Theirs:
  """`transformers` without gradients: one forward pass a step."""

  def __init__(self, model: Any, experts: str, cache: str) -> None:
    """`experts`: an experts implementation; `cache`: static or dynamic."""
    import torch

    self._torch, self.model, self._cache_kind = torch, model, cache
    self._experts = experts
    model.eval()
    model.set_experts_implementation(experts)

  def prefill(self, prompts: np.ndarray) -> np.ndarray:
    """Prompts [B, T] in one pass, cached; the tokens after them [B]."""
    with self._torch.inference_mode():
      out = self.model(
        self._torch.from_numpy(prompts), use_cache=True, logits_to_keep=1
      )
      return out.logits[:, -1].argmax(-1).numpy()

  def start(self, prompts: np.ndarray, room: int) -> np.ndarray:
    """As `prefill`, into a cache that decoding can go on from.

    With the reference's default experts: `batched_mm`, which may be the
    fastest for a few rows, copies the weights of each token's experts.
    """
    from transformers import DynamicCache, StaticCache

    self.model.set_experts_implementation("eager")

    length, config = prompts.shape[1] + room, self.model.config
    with self._torch.inference_mode():
      self._cache = (
        StaticCache(config=config, max_cache_len=length)
        if self._cache_kind == "static"
        else DynamicCache(config=config)
      )
      out = self.model(
        self._torch.from_numpy(prompts), cache=self._cache,
        logits_to_keep=1,
      )  # fmt: skip
      self._kept = copy.deepcopy(self._cache)
      self.model.set_experts_implementation(self._experts)
      return out.logits[:, -1].argmax(-1).numpy()

  def rewind(self) -> None:
    """The cache as it was behind the prompts."""
    with self._torch.inference_mode():
      self._cache = copy.deepcopy(self._kept)

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """A token [B] of every sequence; the next ones [B]."""
    with self._torch.inference_mode():
      out = self.model(
        self._torch.from_numpy(tokens)[:, None], cache=self._cache
      )
      return out.logits[:, -1].argmax(-1).numpy()
