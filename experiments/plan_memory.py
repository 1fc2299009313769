"""What a rank holds and how much room is left: arithmetic on sizes alone."""

import dataclasses

from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.sizes import ModelSize

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Fleet:
  """A model and the ranks it is planned for; bytes are of one rank."""

  name: str  # of the model
  config: ModelConfig
  size: ModelSize
  ranks: int
  attention: int  # ranks that only attend; 0: every rank does both
  memory_bytes: int  # of a device
  working_bytes: int  # of it for programs, activations, links
  context: int  # positions of a KV row
  rows: int  # sequences that a rank serves at once
  chunk: int  # prompt tokens of a step
  losses: int  # expert ranks whose slots are kept in reserve

  def __post_init__(self) -> None:
    least = 2 if self.attention else 1
    if self.ranks < least:
      raise ValueError(f"ranks={self.ranks}: at least {least}")
    if not 0 <= self.attention < self.ranks:
      raise ValueError(
        f"attention={self.attention}: 0 to {self.ranks - 1}, so that a rank of "
        f"{self.ranks} is left for experts"
      )
    if not 0 <= self.losses < self.holders:
      raise ValueError(
        f"losses={self.losses}: 0 to {self.holders - 1} of {self.holders} "
        "ranks that hold experts"
      )

  @property
  def holders(self) -> int:
    """Ranks that hold experts."""
    return self.ranks - self.attention

  @property
  def attending(self) -> int:
    """Ranks that hold KV and everything but experts."""
    return self.attention or self.ranks

  @property
  def usable_bytes(self) -> int:
    return self.memory_bytes - self.working_bytes

  def slots(self, lost: int = 0, extra: int = 0) -> int:
    """Slots of a rank, for all experts and `extra` copies on what is left."""
    return -(-(self.config.n_experts + extra) // (self.holders - lost))

  def row_bytes(self, context: int = 0) -> int:
    """KV of one row; whole blocks, and room for a chunk."""
    options = StepOptions(max_len=context or self.context, chunk=self.chunk)
    return options.cache_len * self.size.token_kv_bytes


@dataclasses.dataclass(frozen=True)
class Held:
  """What a rank of one kind holds, in bytes."""

  what: str  # the kind of rank
  dense: int
  experts: int
  kv: int
  mirror: int = 0  # KV of a neighbour's requests

  @property
  def total(self) -> int:
    return self.dense + self.experts + self.kv + self.mirror


def held(
  fleet: Fleet, slots: int, rows: int, mirrored: bool = False
) -> tuple[Held, ...]:
  """What each kind of rank holds with so many slots and rows."""
  experts, kv = slots * fleet.size.expert_bytes, rows * fleet.row_bytes()
  dense, mirror = fleet.size.dense_bytes, kv if mirrored else 0
  if not fleet.attention:
    return (Held("every rank", dense, experts, kv, mirror),)
  return (
    Held("an attention rank", dense, 0, kv, mirror),
    Held("an expert rank", 0, experts, 0),
  )


def short_bytes(fleet: Fleet, kinds: tuple[Held, ...]) -> int:
  """Bytes that the fullest kind lacks; 0: all fit."""
  return max(0, *(kind.total - fleet.usable_bytes for kind in kinds))


def free_bytes(fleet: Fleet, slots: int, rows: int) -> tuple[int, int]:
  """Bytes left where KV lies and where experts lie; may be negative."""
  left = [fleet.usable_bytes - k.total for k in held(fleet, slots, rows)]
  return left[0], left[-1]


def check_fits(fleet: Fleet) -> None:
  """Raises ValueError, with what would fit, where the bare model doesn't."""
  slots = fleet.slots()
  kinds = held(fleet, slots, fleet.rows)
  if not short_bytes(fleet, kinds):
    return
  worst = max(kinds, key=lambda kind: kind.total)
  raise ValueError(
    f"{fleet.name} in {fleet.config.dtype} doesn't fit: {worst.what} of "
    f"{fleet.ranks} needs {worst.total:,} bytes (dense weights "
    f"{worst.dense:,}, {slots if worst.experts else 0} expert slots "
    f"{worst.experts:,}, KV of {fleet.rows} rows x {fleet.context:,} tokens "
    f"{worst.kv:,}), {worst.total - fleet.usable_bytes:,} more than the "
    f"{fleet.usable_bytes:,} that a device has beside {fleet.working_bytes:,} "
    f"to work with; {_what_fits(fleet)}"
  )


def _what_fits(fleet: Fleet) -> str:
  """The nearest settings that fit, in words."""
  slots = fleet.slots()
  fits = []
  if rows := max_rows(fleet, slots):
    fits.append(f"rows={rows}")
  if context := max_context(fleet, slots):
    fits.append(f"context={context}")
  if ranks := _ranks_that_fit(fleet):
    fits.append(f"ranks={ranks}")
  worst = max(kind.total for kind in held(fleet, slots, fleet.rows))
  need = -(-(worst + fleet.working_bytes) // GB)
  fits.append(f"device_memory_gb={need}")
  return f"what would fit: {' or '.join(fits)}"


def _ranks_that_fit(fleet: Fleet) -> int:
  """The fewest ranks (roles in the same shares) that fit; 0: none do."""
  most = fleet.config.n_experts
  whole = -(-fleet.ranks * most // fleet.holders)  # one slot a rank
  for ranks in range(fleet.ranks + 1, whole + 1):
    attention = fleet.attention * ranks // fleet.ranks
    more = dataclasses.replace(fleet, ranks=ranks, attention=attention)
    if not short_bytes(more, held(more, more.slots(), more.rows)):
      return ranks
  return 0


def max_rows(fleet: Fleet, slots: int, context: int = 0) -> int:
  """Rows of `context` tokens that fit beside the slots, at most."""
  left, experts_left = free_bytes(fleet, slots, 0)
  if min(left, experts_left) < 0:
    return 0
  return left // fleet.row_bytes(context)


def max_context(fleet: Fleet, slots: int) -> int:
  """Tokens of a row that fit with the fleet's rows, in whole KV blocks."""
  left, experts_left = free_bytes(fleet, slots, 0)
  if min(left, experts_left) < 0:
    return 0
  tokens = left // (fleet.rows * fleet.size.token_kv_bytes)
  block = StepOptions().kv_block
  return max(tokens // block * block - fleet.chunk, 0)


def room_for_copies(fleet: Fleet) -> tuple[int, int]:
  """Slots of a rank at most, and copies they hold beyond the first ones.

  Beside the fleet's rows; the slots that `losses` need stay free.
  """
  left = free_bytes(fleet, 0, fleet.rows)[1]
  slots = max(left // fleet.size.expert_bytes, 0)
  copies = slots * (fleet.holders - fleet.losses) - fleet.config.n_experts
  return slots, max(copies, 0)
