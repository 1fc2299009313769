"""Tensors of a checkpoint as plain floats, whatever they are stored as.

Two published quantisations are undone while a tensor is read:

- `fp8`, DeepSeek-V3: a weight in float8 e4m3 and `<name>_scale_inv`, one
  factor per block of 128 x 128 (arXiv 2412.19437, section 3.3.2; the
  checkpoint's README_WEIGHTS).
- `mxfp4`, gpt-oss: `<name>_blocks` with two 4-bit floats a byte, low half
  first, and `<name>_scales`, one power of two per 32 numbers (Open Compute
  Project, Microscaling Formats 1.0, section 5). Stored [E, out, in / 32, 16];
  the model has [E, in, out].
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from third_party.huggingface.tensor_files import FLOATS, Stored, open_folder

METHODS = ("fp8", "mxfp4")
FP8, MXFP4 = METHODS
SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
_BIAS = 127  # of a stored exponent
_FP4 = np.array(
  [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
  np.float32,
)


@dataclasses.dataclass(frozen=True)
class Quantization:
  """What a `quantization_config` says, as far as it is supported."""

  method: str = ""  # one of METHODS; "": plain floats
  block: tuple[int, int] = (128, 128)  # of fp8


def read_quantization(
  where: str, config: Mapping[str, Any] | None, allowed: tuple[str, ...]
) -> Quantization:
  """The quantisation of a family's checkpoint.

  Raises:
    ValueError: a method that isn't supported, or not for this family.
  """
  if config is None:
    return Quantization()
  method = config.get("quant_method")
  if method not in allowed:
    raise ValueError(
      f"{where}: quantization_config.quant_method={method!r}: choose "
      f"{', '.join(allowed) or 'a checkpoint that is not quantised'}"
    )
  if method == MXFP4:
    return Quantization(method)
  if (fmt := config.get("fmt", "e4m3")) != "e4m3":
    raise ValueError(f"{where}: quantization_config.fmt={fmt!r}: choose e4m3")
  block = config.get("weight_block_size")
  if not (
    isinstance(block, list)
    and len(block) == 2
    and all(isinstance(n, int) and n > 0 for n in block)
  ):
    raise ValueError(
      f"{where}: quantization_config.weight_block_size={block!r}: needed are "
      "two sizes, as [128, 128]"
    )
  return Quantization(method, (block[0], block[1]))


class Weights:
  """The tensors of a folder under the names and shapes of the plain model."""

  def __init__(
    self, folder: pathlib.Path, quantization: Quantization
  ) -> None:
    self._quantization = quantization
    self._stored = open_folder(folder)
    self.shapes: dict[str, tuple[int, ...]] = {}
    for name, stored in self._stored.items():
      self._add(name, stored)

  def _add(self, name: str, stored: Stored) -> None:
    method = self._quantization.method
    if method == MXFP4 and name.endswith(BLOCKS):
      self._add_blocks(name.removesuffix(BLOCKS), stored)
    elif method == MXFP4 and name.endswith(SCALES):
      self._partner(name, name.removesuffix(SCALES) + BLOCKS)
    elif method == FP8 and name.endswith(SCALE):
      self._partner(name, name.removesuffix(SCALE))
    elif method == FP8 and stored.dtype == "F8_E4M3":
      scale = self._partner(name, name + SCALE)
      self._expect_grid(name, stored.shape, scale)
      self.shapes[name] = stored.shape
    elif stored.dtype in FLOATS:
      self.shapes[name] = stored.shape
    else:
      raise ValueError(
        f"{stored.file}: {name} is stored as {stored.dtype}; expected is one "
        f"of {', '.join(FLOATS)}, or a quantisation that config.json declares "
        f"({', '.join(METHODS)})"
      )

  def _expect_grid(
    self, name: str, shape: tuple[int, ...], scale: Stored
  ) -> None:
    rows, columns = self._quantization.block
    if len(shape) != 2:
      raise ValueError(
        f"{scale.file}: {name} in float8 has shape {list(shape)}; expected is "
        "[out, in]"
      )
    grid = -(-shape[0] // rows), -(-shape[1] // columns)
    _expect(name + SCALE, scale, grid, ("F32",))

  def _add_blocks(self, name: str, stored: Stored) -> None:
    scales = self._partner(name + BLOCKS, name + SCALES)
    if len(stored.shape) != 4 or stored.shape[3] != 16:
      raise ValueError(
        f"{stored.file}: {name}{BLOCKS} has shape {list(stored.shape)}; "
        "expected is [experts, out, in / 32, 16]"
      )
    _expect(name + BLOCKS, stored, stored.shape, ("U8",))
    _expect(name + SCALES, scales, stored.shape[:3], ("U8",))
    experts, out, groups, half = stored.shape
    self.shapes[name] = (experts, groups * half * 2, out)

  def _partner(self, name: str, other: str) -> Stored:
    """The tensor that a quantised one can't do without."""
    if other not in self._stored:
      raise ValueError(
        f"{self._stored[name].file}: {name} is there without {other}"
      )
    return self._stored[other]

  def read(self, name: str, index: int | None = None) -> np.ndarray:
    """A tensor, or `tensor[index]`, as floats (of what precision it has)."""
    if name not in self._stored:
      blocks, scales = name + BLOCKS, name + SCALES
      return mxfp4(
        self._stored[blocks].read(blocks, index),
        self._stored[scales].read(scales, index),
      )
    value = self._stored[name].read(name, index)
    if self._stored[name].dtype in FLOATS:
      return value
    scale = name + SCALE
    return fp8(
      value, self._stored[scale].read(scale), self._quantization.block
    )


def _expect(
  name: str, stored: Stored, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
  if stored.shape != shape or stored.dtype not in dtypes:
    raise ValueError(
      f"{stored.file}: {name} is {stored.dtype} {list(stored.shape)}; "
      f"expected is {' or '.join(dtypes)} {list(shape)}"
    )


def fp8(
  weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]
) -> np.ndarray:
  """[out, in] float8 and one float32 per block -> [out, in] float32."""
  out = weight.astype(np.float32)
  rows, columns = block
  for i, line in enumerate(scale):
    factors = np.repeat(line, columns)[: out.shape[1]]
    out[i * rows : (i + 1) * rows] *= factors
  return out


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """[..., out, in / 32, 16] and [..., out, in / 32] -> [..., in, out] float32.

  Exact: a number is one of sixteen times a power of two.
  """
  *lead, groups, half = blocks.shape
  out = np.empty((*lead, groups, half, 2), np.float32)
  out[..., 0] = _FP4[blocks & 15]
  out[..., 1] = _FP4[blocks >> 4]
  exponents = scales.astype(np.int32) - _BIAS
  np.ldexp(out, exponents[..., None, None], out=out)
  return out.reshape(*lead, groups * half * 2).swapaxes(-1, -2)
