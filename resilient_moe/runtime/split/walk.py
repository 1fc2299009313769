"""A step of an attention rank, driven a layer at a time."""

from typing import Any, NamedTuple

import numpy as np

from resilient_moe.datapath.exchange import Exchange, ExchangeCancelled
from resilient_moe.datapath.routes import ExpertsUnreachable
from resilient_moe.runtime.device_store import LostRankError
from resilient_moe.runtime.split.attention import AttentionRank, Step, Wanted
from resilient_moe.runtime.split.inline import Hook
from resilient_moe.serving.backend import StepAborted

ENDS = (LostRankError, ExpertsUnreachable, ExchangeCancelled, StepAborted)


class Asked(NamedTuple):
  """A step that an attention rank is asked for."""

  rank: int
  width: int
  ints: np.ndarray  # [1, .] the packed batch
  hook: Hook


class Walk:
  """Goes from layer to layer: `attend`, `send`, `receive`, and again."""

  def __init__(
    self, attention: AttentionRank, exchange: Exchange, asked: Asked
  ) -> None:
    self.ended: Step | Exception | None = None
    self._rank, self._attention = asked.rank, attention
    self._exchange = exchange
    self._layers = attention.layers(asked.width, asked.ints)
    self._y: np.ndarray | None = None  # of the layer before
    self._wanted: Wanted | None = None
    self._out: Any = None  # what is out

  def attend(self) -> None:
    """Begins to attend: the ranks' devices work side by side."""
    if self.ended is not None:
      return
    try:
      if self._attention.deleted:  # by what struck in another rank's step
        raise LostRankError(f"rank {self._rank} is gone in mid-step")
      self._wanted = self._layers.send(self._y)  # type: ignore[arg-type]
    except StopIteration as done:
      self.ended = done.value
    except ENDS as error:
      self.ended = error

  def send(self) -> None:
    """Sends what the experts of a layer are to see."""
    if self.ended is not None:
      return
    try:
      assert self._wanted is not None
      self._out = self._exchange.begin(*self._wanted.read())
    except ENDS as error:
      self.ended = error

  def receive(self) -> None:
    """Waits for what was sent."""
    if self.ended is not None:
      return
    try:
      self._y = self._exchange.end(self._out)
    except ENDS as error:
      self.ended = error

  def outcome(self) -> Step | Exception:
    assert self.ended is not None
    return self.ended
