"""The memory that KV checkpoints are kept in, off the worker they are of.

The semantics of `runtime/kv_checkpoint.py` without its thread: a segment is
copied first and the request's commit record moves forward behind it, so that a
reader never sees half a segment. A segment that would leave a gap is refused
by name; whoever sent it fills the gap with `rebase`.

A step can also come layer by layer while it still runs (an asynchronous log,
after Tarragon, arXiv 2601.01310). Its layers are staged beside the records and
are a segment only once the commit record names them: a step that was aborted,
or whose process died, leaves nothing.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# request, first lane of the data, first position, positions
Segment = tuple[str, int, int, int]

STAGED_STEPS = 4  # of a stream: those that run at a time, or were aborted


class _Record(NamedTuple):
  """What is kept of a request."""

  tokens: int  # positions [0, tokens) are whole
  kv: np.ndarray  # [L, 2K, T, d]


def named_dtype(name: str) -> np.dtype:
  """The dtype of that name; those that only `ml_dtypes` knows, too."""
  try:
    return np.dtype(name)
  except TypeError:
    import ml_dtypes  # bfloat16 and smaller; needs no JAX

    if not hasattr(ml_dtypes, name):
      raise ValueError(
        f"dtype {name!r} is known to neither numpy nor ml_dtypes"
      ) from None
    return np.dtype(getattr(ml_dtypes, name))


class KVMirror:
  """The KV of requests that other processes compute. Thread-safe."""

  def __init__(
    self, request_shape: Sequence[int], dtype: str | np.dtype
  ) -> None:
    """`request_shape` is one request's KV, [L, 2K, T, d]."""
    if len(request_shape) != 4:
      raise ValueError(
        f"request_shape={tuple(request_shape)}: needs 4 sizes, [L, 2K, T, d]"
      )
    self.request_shape = tuple(request_shape)
    self.dtype = named_dtype(dtype) if isinstance(dtype, str) else dtype
    self._lock = threading.Lock()
    self._records: dict[str, _Record] = {}
    self._free: list[np.ndarray] = []  # arrays of forgotten requests
    self._received_bytes = 0

  @property
  def nbytes(self) -> int:
    """Bytes of whole steps and rebases received, refused ones included."""
    return self._received_bytes

  def records(self) -> dict[str, int]:
    """Request -> positions committed."""
    with self._lock:
      return {name: r.tokens for name, r in self._records.items()}

  def get(self, request_id: str) -> np.ndarray | None:
    """A copy of the committed KV, [L, 2K, tokens, d]; None: nothing is kept.

    A copy, because the array is written again when the request begins anew and
    goes to another request when this one is forgotten.
    """
    with self._lock:
      record = self._records.get(request_id)
      if record is None or not record.tokens:
        return None
      return record.kv[:, :, : record.tokens].copy()

  def put(
    self, segments: Iterable[Segment], data: np.ndarray
  ) -> tuple[str, ...]:
    """Stores a step's segments; the requests refused because of a gap.

    Args:
      segments: Runs of positions. One at position 0 begins its request anew,
        any other continues what is committed or writes part of it again.
      data: The lanes they name, [L, n, 2K, d].

    Raises:
      ValueError: a segment or the data don't fit; nothing was changed.
    """
    segments = list(segments)
    self._check(segments, data)
    refused: dict[str, None] = {}  # a set that keeps their order
    with self._lock:
      self._received_bytes += data.nbytes
      for name, lane, start, length in segments:
        record = self._records.get(name)
        if start > (record.tokens if record else 0):
          refused[name] = None
          continue
        if record is None:
          record = _Record(0, self._array())
        stop = start + length
        lanes = data[:, lane : lane + length]  # [L, length, 2K, d]
        record.kv[:, :, start:stop] = np.swapaxes(lanes, 1, 2)
        tokens = max(record.tokens, stop) if start else stop
        self._records[name] = record._replace(tokens=tokens)
    return tuple(refused)

  def rebase(self, request_id: str, kv: np.ndarray) -> None:
    """Replaces a record whole; `kv` [L, 2K, tokens, d].

    Raises:
      ValueError: `kv` doesn't fit; nothing was changed.
    """
    layers, heads, positions, size = self.request_shape
    tokens = kv.shape[2] if kv.ndim == 4 else -1
    if kv.shape != (layers, heads, tokens, size) or tokens > positions:
      raise ValueError(
        f"KV of {request_id!r} is {kv.shape}; a request's is at most "
        f"{self.request_shape}, [L, 2K, T, d]"
      )
    self.check_dtype(kv)
    with self._lock:
      self._received_bytes += kv.nbytes
      record = self._records.get(request_id)
      array = self._array() if record is None else record.kv
      array[:, :, :tokens] = kv
      self._records[request_id] = _Record(tokens, array)

  def forget(self, names: Iterable[str]) -> None:
    """Drops the records; unknown names don't matter."""
    with self._lock:
      for name in names:
        record = self._records.pop(name, None)
        if record is not None:
          self._free.append(record.kv)

  def _array(self) -> np.ndarray:
    """Room for a request. Pages of a new one cost nothing until filled."""
    if self._free:
      return self._free.pop()
    return np.zeros(self.request_shape, self.dtype)

  def _check(self, segments: list[Segment], data: np.ndarray) -> None:
    layers, heads, positions, size = self.request_shape
    lanes = data.shape[1] if data.ndim == 4 else -1
    if data.shape != (layers, lanes, heads, size):
      raise ValueError(
        f"data is {data.shape}; lanes of {self.request_shape} are "
        f"[{layers}, n, {heads}, {size}]"
      )
    self.check_dtype(data)
    for name, lane, start, length in segments:
      inside = 0 <= lane <= lanes - length and 0 <= start <= positions - length
      if length < 1 or not inside:
        raise ValueError(
          f"segment of {name!r}: lane {lane}, start {start}, length {length} "
          f"doesn't fit into {lanes} lanes and {positions} positions"
        )

  def check_dtype(self, data: np.ndarray) -> None:
    """Raises ValueError if it isn't the mirror's."""
    # A cast would go unnoticed, and the KV would not come back as it was.
    if data.dtype != self.dtype:
      raise ValueError(f"data is {data.dtype}; the mirror keeps {self.dtype}")


class _Staged:
  """The layers of a step that has not been committed."""

  def __init__(self, lanes: list[int] | None) -> None:
    self.lanes = lanes  # which these are of the step's; None: all
    self.layers: dict[int, np.ndarray] = {}  # [n, 2K, d] each


class Intake:
  """What one stream brings into a mirror. For one thread, the stream's.

  Staged layers end with it: nobody else could commit them.
  """

  def __init__(self, mirror: KVMirror) -> None:
    self._mirror = mirror
    self._staged: dict[int, _Staged] = {}  # by id, in the order they began
    self._committed = -1  # the last id that was
    self._refused: dict[str, None] = {}  # a set that keeps their order

  def take_refused(self) -> list[str]:
    """Requests refused and not begun anew, rebased or forgotten since."""
    refused, self._refused = self._refused, {}
    return list(refused)

  def put(self, segments: Sequence[Segment], data: np.ndarray) -> None:
    """As `KVMirror.put`."""
    for name, _, start, _ in segments:
      if start == 0:
        self._refused.pop(name, None)
    self._refused |= dict.fromkeys(self._mirror.put(segments, data))

  def rebase(self, request_id: str, kv: np.ndarray) -> None:
    self._mirror.rebase(request_id, kv)
    self._refused.pop(request_id, None)

  def forget(self, names: Iterable[str]) -> None:
    names = list(names)
    self._mirror.forget(names)
    for name in names:
      self._refused.pop(name, None)

  def log(
    self, segment_id: int, layer: int, lanes: list[int] | None,
    data: np.ndarray,
  ) -> None:  # fmt: skip
    """Stages one layer of a step, [n, 2K, d].

    Args:
      segment_id: Of the step; one that can't be committed any more is ignored.
      layer: Its number.
      lanes: Which lanes of the step these are; None: its first n.
      data: The lanes.

    Raises:
      ValueError: it doesn't fit; nothing was changed.
    """
    n_layers, heads, _, size = self._mirror.request_shape
    staged = self._staged.get(segment_id) or _Staged(lanes)
    self._mirror.check_dtype(data)
    n = len(data) if lanes is None and data.ndim else len(lanes or ())
    fits = data.shape == (n, heads, size) and 0 <= layer < n_layers
    others = {d.shape for d in staged.layers.values()} | {data.shape}
    if not fits or lanes != staged.lanes or len(others) > 1:
      raise ValueError(
        f"layer {layer} of step {segment_id} is {data.shape} of lanes {lanes}; "
        f"expected one of {n_layers}, [n, {heads}, {size}], as the others"
      )
    if segment_id <= self._committed:
      return
    staged.layers[layer] = data
    self._staged[segment_id] = staged
    if len(self._staged) > STAGED_STEPS:
      del self._staged[min(self._staged)]

  def commit(self, segment_id: int, segments: Sequence[Segment]) -> None:
    """Makes a logged step count; its requests are refused if it is torn.

    Args:
      segment_id: Larger than that of every step committed before. The last
        one's again is ignored.
      segments: Runs of positions, by the lanes of the step.

    Raises:
      ValueError: a segment doesn't fit; nothing was changed.
    """
    if segment_id == self._committed:
      return
    staged = self._staged.get(segment_id)
    whole = self._mirror.request_shape[0]
    if staged is None or len(staged.layers) < whole:
      self._refused |= dict.fromkeys(name for name, *_ in segments)
      return
    if staged.lanes is not None:
      segments = [_among(staged.lanes, segment) for segment in segments]
    self.put(segments, np.stack([staged.layers[i] for i in range(whole)]))
    self._committed = segment_id
    self._staged = {i: s for i, s in self._staged.items() if i > segment_id}


def _among(lanes: list[int], segment: Segment) -> Segment:
  """The segment by where its lanes are among those that were logged."""
  name, lane, start, length = segment
  found = lanes.index(lane) if lane in lanes else -1
  run = list(range(lane, lane + length))
  if lanes[found : found + length] != run:
    raise ValueError(f"segment of {name!r}: lanes {run} are not all logged")
  return name, found, start, length
