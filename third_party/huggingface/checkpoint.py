"""A published checkpoint as the model's parameters, read tensor by tensor.

`open_checkpoint` reads `config.json` and the headers of the files, and checks
one against the other; no weights. What is then asked for is read straight
into the arrays that it ends in, so a process holds what it asked for and one
tensor besides.
"""

import functools
import os
import pathlib
import zlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import jax
import numpy as np

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.params import ParamSpec, describe
from third_party.huggingface import (
  deepseek_v2,
  deepseek_v3,
  gpt_oss,
  mixtral,
  olmoe,
  qwen3_moe,
)
from third_party.huggingface.fields import Fields
from third_party.huggingface.layout import Model, Parts, assemble, at
from third_party.huggingface.quantized import (
  Quantization,
  Weights,
  read_quantization,
)
from third_party.huggingface.tensor_files import empty, read_json

Tree = dict[str, Any]
CONFIG = "config.json"
FAMILIES: dict[str, ModuleType] = {
  family.ARCHITECTURE: family
  for family in (
    mixtral, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss,
  )
}  # fmt: skip
_EDGE_BYTES = 1 << 16
_NAMED = 3  # tensors that an error about several names


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder's config.json is that of such a checkpoint."""
  file = pathlib.Path(folder) / CONFIG
  return file.is_file() and "model_type" in read_json(file)


def read_config(
  folder: str | os.PathLike[str], dtype: str = ""
) -> ModelConfig:
  """The model's config; reads no weights. `dtype` as in `Checkpoint`."""
  return _read_model(pathlib.Path(folder), dtype)[0].config


class Checkpoint:
  """A checkpoint folder, checked; weights are read when they are asked for."""

  def __init__(
    self, folder: str | os.PathLike[str], dtype: str = ""
  ) -> None:
    """Reads the config and the headers.

    Args:
      folder: has config.json and *.safetensors, with an index if several.
      dtype: what the weights become, "float32" or "bfloat16"; "": what
        config.json says that they are.

    Raises:
      ValueError: for the first thing that is wrong with the folder.
    """
    self._folder = pathlib.Path(folder)
    self._model, quantization = _read_model(self._folder, dtype)
    self._weights = Weights(self._folder, quantization)
    self.config = self._model.config
    _check(self._folder, self._model, self._weights)

  @functools.cached_property
  def _specs(self) -> Tree:
    return describe(self.config)

  def dense(self) -> Tree:
    """All parameters but the routed experts, as host arrays."""
    tree: Tree = self._fill_tree(self._specs, self._model.outer())
    groups, first = [], 0
    for specs, (_, n) in zip(
      self._specs["groups"], self.config.groups(), strict=True
    ):
      layers = [self._model.layer(first + i) for i in range(n)]
      groups.append(self._stack(specs, layers))
      first += n
    return {**tree, "groups": groups}

  def expert(self, expert: int) -> Tree:
    """A routed expert of all layers, [L, ...] leaves."""
    layers = [
      self._model.expert(layer, expert) for layer in self._model.moe_layers()
    ]
    return self._stack(self._specs["experts"], layers, drop_expert=True)

  def experts(self, experts: Iterable[int]) -> dict[int, Tree]:
    """These experts."""
    return {e: self.expert(e) for e in experts}

  def params(self) -> Tree:
    """All parameters, the experts stacked, on the default device."""
    specs: dict[str, ParamSpec] = self._specs["experts"]
    stacks = {key: empty(s.shape, s.dtype) for key, s in specs.items()}
    for place, layer in enumerate(self._model.moe_layers()):
      for e in range(self.config.n_experts):
        for (key,), parts in self._model.expert(layer, e).items():
          assemble(stacks[key][place, e], parts, self._weights.read)
    tree = self.dense()
    # On CPU the arrays are taken over; elsewhere each is given up as soon as
    # the device has it.
    experts = {key: jax.device_put(stacks.pop(key)) for key in list(specs)}
    return {**_on_device(tree), "experts": experts}

  def fingerprint(self) -> int:
    """A number that two folders with the same model share.

    Of the config and of each file its size, its header and the edges of its
    data: a sweep asks for it and must not read every weight.
    """
    crc = zlib.crc32((self._folder / CONFIG).read_bytes())
    for file in sorted(self._folder.glob("*.safetensors")):
      with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        for start in (0, max(0, size - _EDGE_BYTES)):
          stream.seek(start)
          crc = zlib.crc32(stream.read(_EDGE_BYTES), crc)
      crc = zlib.crc32(f"{file.name} {size}".encode(), crc)
    return crc

  def _fill_tree(self, specs: Tree, parts: Parts) -> Tree:
    tree = {}
    for (key,), sources in parts.items():
      tree[key] = empty(specs[key].shape, specs[key].dtype)
      assemble(tree[key], sources, self._weights.read)
    return tree

  def _stack(
    self, specs: Tree, layers: list[Parts], drop_expert: bool = False
  ) -> Tree:
    """A tree whose leaves hold one array a layer."""
    tree: Tree = {}
    for path in layers[0]:
      spec: ParamSpec = at(specs, path)
      shape = spec.shape
      if drop_expert:
        shape = (shape[0], *shape[2:])
      out = empty(shape, spec.dtype)
      for i, parts in enumerate(layers):
        assemble(out[i], parts[path], self._weights.read)
      branch = tree
      for key in path[:-1]:
        branch = branch.setdefault(key, {})
      branch[path[-1]] = out
    return tree


def load_huggingface(
  path: str | os.PathLike[str], dtype: str = "float32"
) -> tuple[ModelConfig, Tree]:
  """A published checkpoint's config and parameters, on the default device.

  Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3, and gpt-oss, as their files
  lie on disk (`config.json`, `*.safetensors` and their index).

  Args:
    path: the checkpoint's folder.
    dtype: of the parameters, "float32" or "bfloat16".

  Raises:
    ValueError: a folder that isn't whole, a tensor that is missing, extra or
      of another shape than the config asks for, or a field that isn't
      supported; names what was found and what was expected.
  """
  checkpoint = Checkpoint(path, dtype)
  return checkpoint.config, checkpoint.params()


def _read_model(
  folder: pathlib.Path, dtype: str
) -> tuple[Model, Quantization]:
  file = folder / CONFIG
  if not file.is_file():
    raise ValueError(f"{folder}: no checkpoint there ({CONFIG} is missing)")
  values = read_json(file)
  fields = Fields(str(file), values)
  family = _family(fields, values)
  said = fields.take("dtype", None) or fields.take("torch_dtype", None)
  if not dtype and not said:
    raise ValueError(f"{file}: dtype is missing; choose float32 or bfloat16")
  model: Model = family.read(fields, dtype or said)
  quantization = read_quantization(
    str(file), fields.take("quantization_config", None),
    getattr(family, "QUANTIZATIONS", ()),
  )  # fmt: skip
  fields.finish()
  return model, quantization


def _family(fields: Fields, values: Tree) -> ModuleType:
  """The family that an architecture, or else a model type, names."""
  names = values.get("architectures") or []
  found = [FAMILIES[name] for name in names if name in FAMILIES]
  kind = values.get("model_type")
  if not names:
    found = [f for f in FAMILIES.values() if kind == f.MODEL_TYPE]
  if len(found) != 1 or len(names) > 1:
    raise fields.error(
      "architectures", names or kind, f"supported: {', '.join(FAMILIES)}"
    )
  if kind != found[0].MODEL_TYPE:
    raise fields.error(
      "model_type", kind, f"architectures={names} has {found[0].MODEL_TYPE!r}"
    )
  return found[0]


def _check(
  folder: pathlib.Path, model: Model, weights: Weights
) -> None:
  """Config and tensors say the same."""
  wanted = model.tensors()
  if missing := [name for name in wanted if name not in weights.shapes]:
    raise ValueError(
      f"{folder}: {CONFIG} asks for tensors that are missing: {_few(missing)}"
    )
  for name, shape in wanted.items():
    if weights.shapes[name] != shape:
      raise ValueError(
        f"{folder}: {name} has shape {list(weights.shapes[name])}; {CONFIG} "
        f"asks for {list(shape)}"
      )
  if extra := [
    name
    for name in weights.shapes
    if name not in wanted and not model.ignores(name)
  ]:
    raise ValueError(
      f"{folder}: tensors that {CONFIG} doesn't ask for: {_few(extra)}"
    )


def _few(names: list[str]) -> str:
  rest = len(names) - _NAMED
  return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _on_device(tree: Any) -> Any:
  """Moves a tree leaf by leaf; a host array is freed when its leaf is done."""
  if isinstance(tree, np.ndarray):
    return jax.device_put(tree)
  keys = list(tree) if isinstance(tree, dict) else range(len(tree))
  for key in keys:
    tree[key] = _on_device(tree[key])
  return tree
