"""Writes a model as a published checkpoint that `transformers` loads.

A family's own description of its tensors is used backwards. Whether it can
say what the model computes is found by reading the written config again.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from resilient_moe.model.config import ModelConfig
from third_party.huggingface import mixtral, qwen3_moe
from third_party.huggingface.fields import Fields
from third_party.huggingface.layout import Model, Parts, at, take_apart
from third_party.huggingface.tensor_files import FLOATS, INDEX, SINGLE

Tree = dict[str, Any]
FAMILIES: dict[str, ModuleType] = {
  family.MODEL_TYPE: family for family in (mixtral, qwen3_moe)
}
_GB = 1_000_000_000
_SPELT = {dtype: name for name, dtype in FLOATS.items()}


def save_huggingface(
  path: str | os.PathLike[str],
  config: ModelConfig,
  params: Tree,
  family: str,
  *,
  max_positions: int = 4096,
  max_shard_bytes: int = 5 * _GB,
) -> None:
  """Writes config.json and safetensors; the folder appears whole or not.

  Args:
    path: the folder; one that is there is replaced if it holds a checkpoint.
    config: the model.
    params: its parameters, written in the dtype that they have.
    family: "mixtral" or "qwen3_moe".
    max_positions: what config.json says of the longest text
      (`max_position_embeddings`); the logits don't depend on it.
    max_shard_bytes: a file that would grow beyond it is followed by another.

  Raises:
    ValueError: the family can't express the model; names the first field, its
      value and the family's.
  """
  if family not in FAMILIES:
    raise ValueError(f"family={family!r}: choose {', '.join(FAMILIES)}")
  if max_shard_bytes < 1 or max_positions < 1:
    raise ValueError(
      f"max_shard_bytes={max_shard_bytes}, max_positions={max_positions}: at "
      "least 1"
    )
  fields, model = _express(FAMILIES[family], config, max_positions)
  final = pathlib.Path(path).absolute()
  if final.exists() and not (final / "config.json").is_file():
    raise ValueError(f"{final}: is there and holds no checkpoint")
  partial = final.with_name(final.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  _write_shards(partial, _tensors(model, params), max_shard_bytes)
  (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
  shutil.rmtree(final, ignore_errors=True)
  partial.rename(final)


def _express(
  family: ModuleType, config: ModelConfig, max_positions: int
) -> tuple[Tree, Model]:
  """The config.json of a family, which says all that the config does."""
  fields: Tree = {
    "architectures": [family.ARCHITECTURE],
    "model_type": family.MODEL_TYPE,
    "dtype": config.dtype,
    "vocab_size": config.vocab_size,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tied_embeddings,
    "hidden_act": "silu",
    "max_position_embeddings": max_positions,
    # The reference would take ids of its own, which may not be in reach.
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    **family.write(config),
  }  # fmt: skip
  said = family.read(Fields("config.json", fields), config.dtype).config
  for field in dataclasses.fields(ModelConfig):
    have, reads = getattr(config, field.name), getattr(said, field.name)
    if have != reads and not _no_windows(field.name, have, reads):
      raise ValueError(
        f"{field.name}={have!r} can't be saved as {family.MODEL_TYPE}, which "
        f"has {reads!r}"
      )
  return fields, family.model(config)


def _no_windows(name: str, have: Any, reads: Any) -> bool:
  return name == "windows" and not any(have) and not any(reads)


def _tensors(model: Model, params: Tree) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor, layer by layer."""
  yield from _of(model.outer(), params)
  layer = moe = 0
  for group, (kind, n) in zip(
    params["groups"], model.config.groups(), strict=True
  ):
    for i in range(n):
      yield from _of(model.layer(layer), group, (i,))
      if kind == "moe":
        for e in range(model.config.n_experts):
          yield from _of(model.expert(layer, e), params["experts"], (moe, e))
        moe += 1
      layer += 1


def _of(
  parts: Parts, tree: Tree, place: tuple[int, ...] = ()
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of one layer, whose parameters are at `place` of a stack."""
  for path, sources in parts.items():
    value = np.asarray(at(tree, path)[place])
    for part in sources:
      yield part.name, take_apart(value, part)


def _write_shards(
  folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], most: int
) -> None:
  """Files of at most `most` bytes (or of one tensor), and their index."""
  files: list[list[str]] = []
  pending: dict[str, np.ndarray] = {}
  held = total = 0
  for name, value in tensors:
    if pending and held + value.nbytes > most:
      files.append(_write_file(folder / f"{len(files)}", pending))
      pending, held = {}, 0
    pending[name] = value
    held += value.nbytes
    total += value.nbytes
  files.append(_write_file(folder / f"{len(files)}", pending))
  if len(files) == 1:
    (folder / "0").rename(folder / SINGLE)
    return
  weight_map: dict[str, str] = {}
  for i, names in enumerate(files):
    file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
    (folder / f"{i}").rename(folder / file)
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
  file: pathlib.Path, tensors: dict[str, np.ndarray]
) -> list[str]:
  """One safetensors file; the names in it."""
  header: Tree = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, value in tensors.items():
    header[name] = {
      "dtype": _SPELT[value.dtype], "shape": value.shape,
      "data_offsets": (end, end + value.nbytes),
    }  # fmt: skip
    end += value.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data begins aligned
  with open(file, "wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for value in tensors.values():
      stream.write(value.reshape(-1).view(np.uint8).data)
  return list(tensors)
