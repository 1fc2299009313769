"""The two kinds of checkpoint folder, behind one face.

Our own (`model.checkpoint`: orbax, one entry an expert) is read at once, which
is what orbax is fast at; a published one (`third_party.huggingface`) expert by
expert. An engine holds what its ranks hold, either way only until all is
placed.
"""

import os
import pathlib
import zlib
from collections.abc import Iterable
from typing import Any, Protocol

from resilient_moe.model import checkpoint as saved
from resilient_moe.model.config import ModelConfig
from third_party import huggingface

Tree = dict[str, Any]


class CheckpointReader(Protocol):
  """What an engine reads its weights from; arrays are NumPy's."""

  config: ModelConfig

  def dense(self) -> Tree:
    """All parameters but the routed experts."""

  def expert(self, expert: int) -> Tree:
    """An expert's [L, ...] leaves, while the engine is being filled."""

  def experts(self, experts: Iterable[int]) -> dict[int, Tree]:
    """These experts, from disk at any time."""

  def release(self) -> None:
    """The engine is filled: frees what is held in memory."""


class Saved:
  """A folder that `save_checkpoint` wrote."""

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder = folder
    self.config, self._tree = saved.load_host(folder)

  def dense(self) -> Tree:
    dense: Tree = self._tree["dense"]
    return dense

  def expert(self, expert: int) -> Tree:
    if not self._tree:
      return self.experts([expert])[expert]
    tree: Tree = self._tree["experts"][f"{expert:03d}"]
    return tree

  def experts(self, experts: Iterable[int]) -> dict[int, Tree]:
    return saved.load_experts(self._folder, self.config, experts)

  def release(self) -> None:
    self._tree = {}


class Published(huggingface.Checkpoint):
  """A folder of config.json and *.safetensors; nothing is held."""

  def release(self) -> None:
    pass


def open_checkpoint(
  folder: str | os.PathLike[str], dtype: str = ""
) -> CheckpointReader:
  """A checkpoint folder of either kind.

  Args:
    folder: of the model.
    dtype: of the weights; "": as the folder says. A folder that
      `save_checkpoint` wrote has only the one it says.

  Raises:
    ValueError: it isn't whole, or has another dtype.
  """
  if huggingface.is_checkpoint(folder):
    return Published(folder, dtype)
  read_config(folder, dtype)
  return Saved(pathlib.Path(folder))


def read_config(
  folder: str | os.PathLike[str], dtype: str = ""
) -> ModelConfig:
  """The model's config; reads no weights."""
  if huggingface.is_checkpoint(folder):
    return huggingface.read_config(folder, dtype)
  config = saved.read_config(folder)
  if dtype not in ("", config.dtype):
    raise ValueError(
      f"dtype={dtype!r}: {folder} was saved as {config.dtype!r}; save it again "
      "for another"
    )
  return config


def check_checkpoint(
  folder: str | os.PathLike[str], dtype: str = ""
) -> tuple[ModelConfig, int]:
  """The config of a folder that is whole, and a number that identifies it.

  The number is a CRC of the manifest, or of what a published folder's files
  say of themselves (config, headers and sizes), not of every weight.
  """
  path = pathlib.Path(folder)
  if huggingface.is_checkpoint(path):
    checkpoint = huggingface.Checkpoint(path, dtype)
    return checkpoint.config, checkpoint.fingerprint()
  config = read_config(path, dtype)
  saved.check_manifest(path)
  return config, zlib.crc32((path / "manifest.json").read_bytes())
