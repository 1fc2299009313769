"""Counts what a process compiles: a loss must make nobody compile."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
  """Compilations in this process from now on."""

  def __init__(self) -> None:
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._hear)

  def _hear(
    self, event: str, duration_secs: float, **kwargs: str | int
  ) -> None:
    del duration_secs, kwargs
    self.count += event == _EVENT
