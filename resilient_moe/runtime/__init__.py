"""The backends, the engine that serves on them, and the gateway before it.

The names are looked up when they are used: the gateway needs no JAX.
"""

import importlib
from typing import Any

_HOME = {
  "Case": "case",
  "Generation": "generate",
  "RunFailed": "case",
  "generate": "generate",
  "run_case": "gateway",
  "serve_inline": "inline",
}


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_HOME[name]}")
  return getattr(module, name)


def __dir__() -> list[str]:
  return sorted(_HOME)
