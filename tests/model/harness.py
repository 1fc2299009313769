"""Runs the serving step by hand on a tiny model: no scheduler, no recovery.

The programs are the real ones (`mesh.programs`) with one difference: they
return the logits beside the token that was sampled from them, so that logits
can be compared bit for bit.
"""

import dataclasses
import functools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resilient_moe.mesh import programs
from resilient_moe.mesh.executables import compiler_options
from resilient_moe.model import ModelConfig, StepOptions, describe, step
from resilient_moe.model.checkpoint import split_experts
from resilient_moe.model.dispatch import AXIS
from resilient_moe.model.params import ParamSpec, is_spec
from resilient_moe.model.sampling import sample

# 7 experts: no number of ranks but 1 and 7 divides them.
TINY = ModelConfig(
  vocab_size=96, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8,
  n_experts=7, top_k=2, expert_width=24, shared_width=16,
)  # fmt: skip
# Another run of layers before these, its own unembedding, raw gates.
OTHER = dataclasses.replace(
  TINY, n_layers=3, dense_layers=1, dense_width=40, shared_width=0,
  tied_embeddings=False, norm_topk_prob=False,
)  # fmt: skip
OPTIONS = StepOptions(rows=3, max_len=320, chunk=12, kv_block=16)


def fast_jit(fn, **kwargs):
  """`jax.jit` with the options that the engine's programs have."""
  return jax.jit(fn, compiler_options=compiler_options(), **kwargs)


@functools.cache
def tiny_params(config: ModelConfig = TINY, seed: int = 0) -> dict:
  """Random weights in NumPy, with sharper routers than the initial ones."""
  rng = np.random.default_rng(seed)

  def draw(spec: ParamSpec) -> np.ndarray:
    if not spec.fan_in:
      return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
    noise = rng.standard_normal(spec.shape) / np.sqrt(spec.fan_in)
    return noise.astype(np.float32)

  params = jax.tree.map(draw, describe(config), is_leaf=is_spec)
  for group in params["groups"]:
    if "moe" in group:
      group["moe"]["router"] *= 4
  cast = lambda spec, x: x.astype(spec.dtype)
  return jax.tree.map(cast, describe(config), params, is_leaf=is_spec)


class Token(NamedTuple):
  """One decode row's work."""

  rank: int
  row: int
  token: int
  position: int
  seed: int = 0
  temperature: float = 0.0


def skip_without_bits(kernels: str) -> None:
  """Where a kind of kernels doesn't promise equal bits for all shapes."""
  if kernels == "xla" and jax.__version_info__ >= (0, 11):
    pytest.skip("XLA's products have other classes of row counts on jax 0.11")


class Prompt(NamedTuple):
  """One rank's chunk of a prompt."""

  rank: int
  row: int
  tokens: tuple[int, ...]
  start: int = 0
  seed: int = 0
  temperature: float = 0.0


class Result(NamedTuple):
  """What a step returned, as NumPy."""

  delta: np.ndarray  # [L, R, B + C, heads, w]
  logits: np.ndarray  # [R, B + 1, V]
  tokens: np.ndarray  # [R, B + 1]


def placement(
  n_ranks: int,
  slots: int,
  *,
  order: np.ndarray | None = None,
  copies: int = 1,
  e: int = TINY.n_experts,
) -> np.ndarray:
  """[E, copies, 2] (rank, slot): the slots are filled in `order`."""
  filled = np.resize(np.arange(e) if order is None else order, copies * e)
  entries = np.full((e, copies, 2), -1, np.int32)
  for index, expert in enumerate(filled):
    entries[expert, index // e] = index % n_ranks, index // n_ranks
  assert entries[:, :, 1].max() < slots
  return entries


class Engine:
  """Step and commit programs over `n_ranks`, and the arrays they work on."""

  def __init__(
    self,
    n_ranks: int,
    *,
    dispatch: str = "all_to_all",
    logical: bool = False,
    row_block: int = 32,
    kernels: str = "native",
    config: ModelConfig = TINY,
    copies: int = 2,
  ) -> None:
    self.options = dataclasses.replace(
      OPTIONS, dispatch=dispatch, row_block=row_block, kernels=kernels
    )
    self.config = config
    self.n_ranks, self.logical = n_ranks, logical
    slots = -(-copies * config.n_experts // n_ranks)
    self.shape = programs.InstanceShape(config, self.options, slots, copies)
    self._programs: dict[int, tuple] = {}
    self.place(placement(n_ranks, slots, e=config.n_experts))
    self.reset()

  def reset(self) -> None:
    """Fills the cache with what no result may depend on."""
    size = list(step.cache_shape(self.config, self.options))
    size[1] = self.n_ranks
    full = np.full(size, 0.5, self.config.dtype)
    self.cache = self._put(full, P(None, AXIS))

  def place(self, entries: np.ndarray) -> None:
    """Weights into slots, and the routing table that says so."""
    tree = split_experts(self.config, tiny_params(self.config))
    shapes = programs.expert_shapes(self.shape, self.n_ranks)
    stacks = {n: np.full(s.shape, np.nan, s.dtype) for n, s in shapes.items()}
    for expert, copies in enumerate(entries):
      for rank, slot in copies[copies[:, 0] >= 0]:
        for name, value in tree["experts"][f"{expert:03d}"].items():
          stacks[name][:, rank, slot] = value
    wide = np.full((len(entries), self.shape.copies, 2), -1, np.int32)
    wide[:, : entries.shape[1]] = entries
    routing = step.routing_arrays(
      wide, np.arange(self.n_ranks), self.shape.slots,
      np.zeros(self.config.n_experts, bool),
    )  # fmt: skip
    specs, _ = programs.step_specs(self.shape)
    params = programs.with_experts(tree["dense"], stacks)
    self.params = self._put(params, specs[0])
    self.routing = self._put(routing, specs[2])

  def step(self, work: list[Token | Prompt], *, commit: bool = True) -> Result:
    """One step; with `commit=False` as it is when it fails elsewhere."""
    ints = self._packed(work)
    run, do_commit = self._compiled(ints.shape[1])
    ints = self._put(ints, P(AXIS))
    delta, out = run(self.params, self.cache, self.routing, ints)
    jax.block_until_ready(delta)
    if commit:
      self.cache = do_commit(self.cache, delta, ints)
    out = np.asarray(out)
    return Result(
      np.asarray(delta), out[:, :, :-1], out[:, :, -1].astype(np.int32)
    )

  def prefill(self, work: Prompt, beside: tuple = ()) -> Result:
    """A whole prompt, chunk by chunk; the last chunk's result."""
    width, result = self.options.chunk, None
    for at in range(0, len(work.tokens), width):
      part = work._replace(start=at, tokens=work.tokens[at : at + width])
      result = self.step([part, *beside])
    assert result is not None
    return result

  def kv(self, rank: int, row: int, stop: int) -> np.ndarray:
    """What the cache holds of a row, [L, 2K, stop, d]."""
    return np.asarray(self.cache)[:, rank, row, :, :stop]

  def _packed(self, work: list[Token | Prompt]) -> np.ndarray:
    r, b = self.n_ranks, self.options.rows
    wide = any(isinstance(w, Prompt) for w in work)
    decode = np.zeros((r, b, 3), np.int32)
    decode[:, :, 1] = -1
    heat, chunk_heat = np.zeros((r, b)), np.zeros(r)
    chunk = np.zeros((r, self.options.chunk if wide else 0), np.int32)
    fields = np.zeros((r, 4), np.int32)
    for w in work:
      if isinstance(w, Token):
        decode[w.rank, w.row] = w.token, w.position, w.seed
        heat[w.rank, w.row] = w.temperature
      else:
        chunk[w.rank, : len(w.tokens)] = w.tokens
        fields[w.rank] = w.start, len(w.tokens), w.row, w.seed
        chunk_heat[w.rank] = w.temperature
    return step.pack(decode, heat, chunk, fields, chunk_heat)

  def _compiled(self, width: int) -> tuple:
    chunk = width - step.batch_width(self.options, 0)
    if chunk not in self._programs:
      with mock.patch.object(step, "sample", _logits_and_token):
        lowered = self._lower(chunk)
      compiled = lowered.compile(compiler_options=compiler_options())
      self._programs[chunk] = compiled, self._commit(chunk)
    return self._programs[chunk]

  def _lower(self, chunk: int) -> jax.stages.Lowered:
    devices = jax.devices()[: self.n_ranks]
    if self.logical:
      return programs.lower_logical_step(
        self.shape, devices[0], self.n_ranks, chunk
      )
    return programs.lower_step(self.shape, devices, chunk)

  def _commit(self, chunk: int):
    commit = step.commit_chunk if chunk else step.commit_rows
    fn = functools.partial(commit, self.options)
    if self.logical:
      one = lambda c, d, i: fn(c[:, None], d[:, None], i[None])[:, 0]
      return fast_jit(jax.vmap(one, in_axes=(1, 1, 0), out_axes=1))
    by_rank = (P(None, AXIS), P(None, AXIS), P(AXIS))
    fn = jax.shard_map(
      fn, mesh=self._mesh(), in_specs=by_rank, out_specs=by_rank[0],
      check_vma=False,
    )  # fmt: skip
    return fast_jit(fn)

  def _mesh(self):
    return programs.make_mesh(jax.devices()[: self.n_ranks])

  def _put(self, tree, specs):
    if self.logical:
      return jax.device_put(tree, jax.devices()[0])
    place = lambda spec: NamedSharding(self._mesh(), spec)
    return jax.device_put(tree, jax.tree.map(place, specs))


def _logits_and_token(logits, seeds, positions, temperatures):
  """In place of `sample`: [n, V + 1], the token in the last column."""
  token = sample(logits, seeds, positions, temperatures)
  return jnp.append(logits, token[:, None].astype(jnp.float32), axis=1)
