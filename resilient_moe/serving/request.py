"""Requests, and where each of them stands."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
  """What a client asks for."""

  request_id: str
  prompt: tuple[int, ...]  # token ids
  max_new_tokens: int
  seed: int = 0  # sampling noise is keyed by (seed, position)
  temperature: float = 0.0  # 0: greedy
  stop: tuple[int, ...] = ()  # token ids that end the text (and are part of it)
  arrival_step: int | None = 0  # when it arrives, in steps ...
  arrival_s: float | None = None  # ... or in seconds since the start
  retry_of: str | None = None  # the request that a client sends again


@dataclasses.dataclass(frozen=True)
class Sequence:
  """A request in flight: its tokens so far and its place."""

  request: Request
  order: int  # of acceptance; ties are broken by it everywhere
  tokens: tuple[int, ...] = ()  # emitted so far
  rank: int = -1  # -1: queued
  row: int = -1  # KV slot on the rank
  computed: int = 0  # positions whose KV the slot holds

  @property
  def known(self) -> int:
    """Positions whose token is known: prompt and emitted."""
    return len(self.request.prompt) + len(self.tokens)

  def token(self, position: int) -> int:
    """The token at a position."""
    prompt = self.request.prompt
    if position < len(prompt):
      return prompt[position]
    return self.tokens[position - len(prompt)]

  def span(self, start: int, stop: int) -> tuple[int, ...]:
    """The tokens at positions [start, stop)."""
    n = len(self.request.prompt)
    if stop <= n:
      return self.request.prompt[start:stop]
    return (self.request.prompt + self.tokens)[start:stop]
