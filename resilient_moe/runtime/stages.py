"""How long each stage of a start took."""

import time
from collections.abc import Callable


class Stages:
  """Tells `note` each stage's name and its seconds, from the last one on."""

  def __init__(self, note: Callable[[str, float], None]) -> None:
    self._note = note
    self._since = time.monotonic()

  def done(self, stage: str) -> None:
    now = time.monotonic()
    self._note(stage, now - self._since)
    self._since = now
