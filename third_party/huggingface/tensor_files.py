"""Reads safetensors files: headers first, then one tensor (or row) at a time.

The format (github.com/huggingface/safetensors, README, "Format"): eight bytes
with the header's length, a JSON header of `{name: {dtype, shape,
data_offsets}}`, and the data behind it without holes. Read here, and not with
the package of that name, because a mapped file counts as this process' memory
and because an error must name the tensor and what was expected of it.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPES = FLOATS | {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "U8": np.dtype(np.uint8),
}
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 100_000_000
ALIGN_BYTES = 64  # where JAX on CPU takes a host array as it is


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor as it lies in a file."""

  file: pathlib.Path
  dtype: str  # as the header spells it
  shape: tuple[int, ...]
  offset: int  # of its first byte in the file

  def read(self, name: str, index: int | None = None) -> np.ndarray:
    """The tensor, or `tensor[index]` without reading the rest."""
    dtype = DTYPES[self.dtype]
    shape, offset = self.shape, self.offset
    if index is not None:
      shape = shape[1:]
      offset += index * int(np.prod(shape)) * dtype.itemsize
    out = empty(shape, dtype)
    view = out.reshape(-1).view(np.uint8).data
    with open(self.file, "rb", buffering=0) as file:
      while view:
        count = os.preadv(file.fileno(), [view], offset)
        if not count:
          raise ValueError(
            f"{self.file}: truncated: {len(view)} bytes of {name} are missing"
          )
        view, offset = view[count:], offset + count
    return out


def empty(shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
  """An uninitialised array that JAX on CPU takes over without a copy."""
  dtype = np.dtype(dtype)
  nbytes = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(nbytes + ALIGN_BYTES, np.uint8)
  start = -raw.ctypes.data % ALIGN_BYTES
  return raw[start : start + nbytes].view(dtype).reshape(shape)


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """Every tensor of a checkpoint folder by its name; reads headers only.

  Raises:
    ValueError: no checkpoint there, an index that doesn't fit the files, or a
      file that isn't whole.
  """
  index = folder / INDEX
  if not index.is_file():
    if not (folder / SINGLE).is_file():
      raise ValueError(f"{folder}: neither {INDEX} nor {SINGLE} is there")
    return read_header(folder / SINGLE)
  wanted = read_json(index).get("weight_map")
  if not isinstance(wanted, dict) or not wanted:
    raise ValueError(f"{index}: weight_map is {wanted!r}; needed: name: file")
  files = sorted(set(wanted.values()))
  if absent := [f for f in files if not (folder / f).is_file()]:
    raise ValueError(
      f"{index}: names files that are absent: {', '.join(absent)}"
    )
  found: dict[str, Stored] = {}
  for file in files:
    for name, stored in read_header(folder / file).items():
      if wanted.get(name) != file:
        raise ValueError(
          f"{folder / file}: holds {name}, which {INDEX} has in "
          f"{wanted.get(name, 'no file')}"
        )
      found[name] = stored
  for name, file in wanted.items():
    if name not in found:
      raise ValueError(f"{index}: {name} is not in {file}")
  return found


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """A JSON object."""
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"{file}: not readable as JSON ({error})") from error
  if not isinstance(value, dict):
    raise ValueError(f"{file}: holds a {type(value).__name__}, not an object")
  return value


def read_header(file: pathlib.Path) -> dict[str, Stored]:
  """The tensors of one file, checked against its size."""
  size = file.stat().st_size
  with open(file, "rb") as stream:
    head = stream.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    limit = min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES)
    if len(head) < _LENGTH_BYTES or length > limit:
      raise ValueError(
        f"{file}: no safetensors file: a header of {length} bytes, at most "
        f"{max(limit, 0)} can be there"
      )
    text = stream.read(length)
  try:
    header = json.loads(text)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, e) for name, e in header.items()}
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file}: damaged header ({error})") from error
  found, end = {}, 0
  for name, (begin, stop, dtype, shape) in sorted(
    entries.items(), key=lambda item: item[1][0]
  ):
    if begin != end:
      raise ValueError(f"{file}: {name} begins at {begin}, expected {end}")
    end = stop
    offset = _LENGTH_BYTES + length + begin
    if offset + stop - begin > size:
      raise ValueError(
        f"{file}: truncated: {name} ends at byte {offset + stop - begin} of "
        f"{size}"
      )
    found[name] = Stored(file, dtype, shape, offset)
  if _LENGTH_BYTES + length + end != size:
    raise ValueError(
      f"{file}: {size} bytes; its header describes "
      f"{_LENGTH_BYTES + length + end}"
    )
  return found


def _entry(
  file: pathlib.Path, name: str, entry: dict[str, Any]
) -> tuple[int, int, str, tuple[int, ...]]:
  """(begin, end, dtype, shape) of a header's entry."""
  begin, end = entry["data_offsets"]
  dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
  if dtype in DTYPES:
    needed = int(np.prod(shape)) * DTYPES[dtype].itemsize
    if end - begin != needed:
      raise ValueError(
        f"{name}: {dtype} {list(shape)} takes {needed} bytes, the offsets "
        f"say {end - begin}"
      )
  return int(begin), int(end), str(dtype), shape
