"""Checkpoints on disk: config.json, an orbax tree, and a manifest.

Every expert is stored by itself, so that a recovery reads the experts it lost
and nothing else. The manifest (size and CRC of each file) makes a truncated
or corrupt checkpoint one clear error before anything is used.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.params import ParamSpec, describe, is_spec

Tree = dict[str, Any]
_CONFIG, _PARAMS, _MANIFEST = "config.json", "params", "manifest.json"


def save_checkpoint(
  path: str | os.PathLike,
  config: ModelConfig,
  params: Tree,
  dtype: str | None = None,
) -> None:
  """Writes a checkpoint folder; it appears whole or not at all.

  `dtype` is the type on disk ("bfloat16" halves the shipped model); it is
  loaded back as `config.dtype`.
  """
  import orbax.checkpoint as ocp

  final = pathlib.Path(path).absolute()
  partial = final.with_name(final.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)

  def cast(spec: ParamSpec, x: Any) -> np.ndarray:
    narrow = dtype if dtype and spec.dtype == config.dtype else spec.dtype
    return np.asarray(jnp.asarray(x).astype(narrow))

  specs = describe(config)
  tree = split_experts(
    config, jax.tree.map(cast, specs, params, is_leaf=is_spec)
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
    saver.save(partial / _PARAMS, args=ocp.args.PyTreeSave(tree))
  for marker in (partial / _PARAMS).glob("commit_success.txt"):
    marker.write_text("committed\n")  # orbax writes the machine's path there
  (partial / _CONFIG).write_text(
    json.dumps(dataclasses.asdict(config), indent=2) + "\n"
  )
  (partial / _MANIFEST).write_text(
    json.dumps(_fingerprints(partial), indent=1) + "\n"
  )
  shutil.rmtree(final, ignore_errors=True)
  partial.rename(final)


def load_checkpoint(path: str | os.PathLike) -> tuple[ModelConfig, Tree]:
  """A checkpoint's config and parameters, as arrays on the default device."""
  config, tree = load_host(path)
  return config, jax.tree.map(jnp.asarray, join_experts(tree))


def load_host(path: str | os.PathLike) -> tuple[ModelConfig, Tree]:
  """As NumPy arrays, with the experts still apart: what an engine loads.

  Returns the config and `{"dense": tree, "experts": {"000": {...}, ...}}`.
  """
  folder = pathlib.Path(path).absolute()
  config = read_config(folder)
  check_manifest(folder)
  wanted = jax.eval_shape(
    lambda: split_experts(config, _zeros(describe(config)))
  )
  return config, _restore(folder, wanted)


def load_experts(
  path: str | os.PathLike, config: ModelConfig, experts: Iterable[int]
) -> dict[int, Tree]:
  """Only these experts' weights from disk (the DISK tier of a recovery)."""
  folder = pathlib.Path(path).absolute()
  wanted = jax.eval_shape(
    lambda: split_experts(config, _zeros(describe(config)))
  )
  names = {expert: f"{expert:03d}" for expert in experts}
  part = {"experts": {n: wanted["experts"][n] for n in names.values()}}
  tree = _restore(folder, part)
  return {expert: tree["experts"][name] for expert, name in names.items()}


def split_experts(config: ModelConfig, params: Tree) -> Tree:
  """Stacked parameters -> dense tree + one tree of [L, ...] per expert."""
  dense = dict(params)
  experts = dense.pop("experts")
  each = {
    f"{e:03d}": jax.tree.map(lambda x, e=e: x[:, e], experts)
    for e in range(config.n_experts)
  }
  return {"dense": dense, "experts": each}


def join_experts(tree: Tree) -> Tree:
  """The inverse of `split_experts`, in NumPy."""
  names = sorted(tree["experts"])
  trees = [tree["experts"][name] for name in names]
  stacked = jax.tree.map(lambda *x: np.stack(x, axis=1), *trees)
  return {**tree["dense"], "experts": stacked}


def read_config(folder: str | os.PathLike) -> ModelConfig:
  """The model's config, with one clear error for each way it can be wrong."""
  file = pathlib.Path(folder) / _CONFIG
  if not file.is_file():
    raise ValueError(f"{folder}: no checkpoint there ({_CONFIG} is missing)")
  try:
    fields = json.loads(file.read_text())
  except json.JSONDecodeError as e:
    raise ValueError(f"{file}: not valid JSON ({e})") from e
  known = {f.name for f in dataclasses.fields(ModelConfig)}
  if unknown := sorted(set(fields) - known):
    raise ValueError(
      f"{file}: unknown fields {unknown}; known: {', '.join(sorted(known))}"
    )
  return ModelConfig(**fields)


def check_manifest(folder: pathlib.Path) -> None:
  """Raises ValueError where a file is missing, short or altered."""
  file = folder / _MANIFEST
  if not file.is_file():
    raise ValueError(f"{folder}: checkpoint without {_MANIFEST}: incomplete")
  try:
    expected = json.loads(file.read_text())
  except json.JSONDecodeError as e:
    raise ValueError(f"{file}: not valid JSON ({e})") from e
  found = _fingerprints(folder)
  for name, (size, crc) in expected.items():
    if name not in found:
      raise ValueError(f"{folder}: corrupt checkpoint: {name} is missing")
    if found[name] != [size, crc]:
      raise ValueError(
        f"{folder}: corrupt checkpoint: {name} has {found[name][0]} bytes "
        f"and CRC {found[name][1]:08x}; expected {size} and {crc:08x}"
      )


def _fingerprints(folder: pathlib.Path) -> dict[str, list[int]]:
  files = sorted(f for f in folder.rglob("*") if f.is_file())
  return {
    f.relative_to(folder).as_posix(): [
      f.stat().st_size,
      zlib.crc32(f.read_bytes()),
    ]
    for f in files
    if f.name != _MANIFEST
  }


def _zeros(specs: Tree) -> Tree:
  def zero(spec: ParamSpec) -> jax.Array:
    return jnp.zeros(spec.shape, spec.dtype)

  return jax.tree.map(zero, specs, is_leaf=is_spec)


def _restore(folder: pathlib.Path, wanted: Tree) -> Tree:
  import orbax.checkpoint as ocp

  leaf = lambda s: ocp.RestoreArgs(restore_type=np.ndarray, dtype=s.dtype)
  args = ocp.args.PyTreeRestore(
    item=wanted,
    restore_args=jax.tree.map(leaf, wanted),
    partial_restore=True,
  )
  # Each process of a job reads by itself: nobody waits for the others, of
  # whom some may be dead.
  alone = ocp.options.MultiprocessingOptions()
  if jax.process_count() > 1:
    alone = ocp.options.MultiprocessingOptions(
      primary_host=None,
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as loader:
    tree = loader.restore(folder / _PARAMS, args=args)
  for (key, want), got in zip(
    jax.tree_util.tree_leaves_with_path(wanted),
    jax.tree.leaves(tree),
    strict=True,
  ):
    if not isinstance(got, np.ndarray):  # orbax left the placeholder
      raise ValueError(
        f"{folder}: {jax.tree_util.keystr(key)} is missing; the config asks "
        f"for {want.shape}"
      )
    if got.shape != want.shape:
      raise ValueError(
        f"{folder}: {jax.tree_util.keystr(key)} has shape {got.shape}; the "
        f"config asks for {want.shape}"
      )
  return tree
