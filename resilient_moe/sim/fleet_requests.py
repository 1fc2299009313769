"""The requests of a group at the moment of a fault: a table for its view."""

import dataclasses
import functools

import numpy as np

from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.effects import sealed
from resilient_moe.recovery.view import ClusterView, RequestTable
from resilient_moe.sim.arrivals import Load

LAG_TOKENS = 2  # a checkpoint trails the last token by


@dataclasses.dataclass(frozen=True)
class Seated:
  """How full a group is."""

  rows: float  # of a rank, on the mean
  checkpoint: str = "none"  # as in `Standing`


@functools.lru_cache(maxsize=8)
def _names(n: int) -> tuple[str, ...]:
  return tuple(f"q{i}" for i in range(n))


def in_decode(
  view: ClusterView, load: Load, seated: Seated, rng: np.random.Generator
) -> ClusterView:
  """The view with requests in mid-decode, dealt evenly over its ranks.

  Who is caught running is a long request more often than a short one, and
  anywhere between its first token and its last.
  """
  ranks = request_ranks(view)
  most = len(ranks) * view.rows_per_rank
  n = min(round(seated.rows * len(ranks)), most)
  rank = ranks[np.arange(n) % max(len(ranks), 1)]
  runs = np.cumsum(load.generated) / load.generated.sum()
  who = np.searchsorted(runs, rng.uniform(0, 1, n))
  prompt, asked = load.context[who], load.generated[who]
  emitted = 1 + np.floor(rng.uniform(0, 1, n) * (asked - 1)).astype(np.int64)
  kv = prompt + emitted - 1
  holder = np.full(n, -1)
  if seated.checkpoint == "peer":
    holder = np.roll(ranks, -1)[np.arange(n) % max(len(ranks), 1)]
  kept = np.maximum(kv - LAG_TOKENS, 0) * (seated.checkpoint != "none")
  columns = (rank, prompt, emitted, kv, kept, holder)
  arrays = (sealed(column, np.int32) for column in columns)
  return dataclasses.replace(view, requests=RequestTable(_names(n), *arrays))


def tokens_of(view: ClusterView, names: tuple[str, ...]) -> int:
  """Prompt and new tokens of the named requests, summed."""
  table = view.requests
  length = table.prompt_tokens + table.emitted_tokens
  if len(names) == len(table.request_id):
    return int(length.sum())
  wanted = set(names)
  index = [i for i, name in enumerate(table.request_id) if name in wanted]
  return int(length[index].sum())
