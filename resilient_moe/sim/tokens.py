"""A model in a hash: what KV rows hold, and what is said after it.

The KV of a request is a digest of all its tokens, so a request whose row holds
anything but the KV of exactly its own positions says something else from then
on, and the checkers see it as they would on real arrays. Experts that a mask
hides change the digest, as they change real KV.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from resilient_moe.serving.scheduler import StepBatch

LETTERS = b"abcdefghijklmnopqrstuvwxyz     "  # so that text looks like text
NOBODYS = 0x5EED  # stands for KV that nobody has computed
_TOKEN = struct.Struct("<i")
_SAYS = struct.Struct("<II")


class Held(NamedTuple):
  """The KV in a row: whose, how many positions, and a digest of them."""

  request_id: str
  tokens: int
  digest: int


Delta = dict[tuple[int, int], Held]  # (rank, row) -> after the step


def mask_key(masked: np.ndarray) -> bytes:
  """What a mask, [E] bool, adds to the digest of each token; usually b""."""
  return np.packbits(masked).tobytes() if masked.any() else b""


class Rows:
  """The KV rows of all ranks."""

  def __init__(self, vocab_size: int) -> None:
    self._vocab_size = vocab_size
    self._held: dict[tuple[int, int], Held] = {}
    self.wrong: list[str] = []  # requests that were given foreign KV

  def compute(
    self, batch: StepBatch, key: bytes
  ) -> tuple[np.ndarray, Delta]:
    """Sampled tokens [R, B + 1] int32, and the delta; changes nothing."""
    said = np.full((len(batch.mesh), batch.decode.shape[1] + 1), -1, np.int32)
    delta: Delta = {}
    for r in batch.rows:
      token, position, seed = batch.decode[r.place, r.row].tolist()
      at = batch.mesh[r.place], r.row
      digest = self._before(at, r.request_id, position)
      digest = zlib.crc32(key + _TOKEN.pack(token), digest)
      delta[at] = Held(r.request_id, position + 1, digest)
      said[r.place, r.row] = self._says(digest, seed)
    for c in batch.chunks:
      at = batch.mesh[c.place], c.row
      digest = self._before(at, c.request_id, c.start)
      tokens = batch.chunk[c.place, : c.length].astype("<i4").tobytes()
      if key:
        tokens = b"".join(
          key + tokens[i : i + 4] for i in range(0, len(tokens), 4)
        )
      digest = zlib.crc32(tokens, digest)
      delta[at] = Held(c.request_id, c.start + c.length, digest)
      seed = int(batch.chunk_fields[c.place, 3])
      said[c.place, -1] = self._says(digest, seed)
    return said, delta

  def _before(self, at: tuple[int, int], name: str, position: int) -> int:
    """The digest of the positions before; a foreign one if others lie there."""
    if position == 0:
      return 0
    held = self._held.get(at)
    if held is not None and held[:2] == (name, position):
      return held.digest
    self.wrong.append(name)
    return NOBODYS

  def _says(self, digest: int, seed: int) -> int:
    drawn = zlib.crc32(_SAYS.pack(digest, seed & 0xFFFFFFFF))
    if self._vocab_size > max(LETTERS):
      return LETTERS[drawn % len(LETTERS)]
    return drawn % self._vocab_size

  def commit(self, delta: Delta) -> None:
    self._held.update(delta)

  def read(self, rank: int, row: int, name: str, tokens: int) -> Held | None:
    """A request's live KV, if its row holds just that."""
    held = self._held.get((rank, row))
    return held if held and held[:2] == (name, tokens) else None

  def write(self, rank: int, row: int, held: Held) -> None:
    self._held[rank, row] = held

  def lose(self, rank: int) -> None:
    """All that was in the rank's memory."""
    self._held = {at: h for at, h in self._held.items() if at[0] != rank}
