"""Runs all checkers over a history: the content of `verdict.json`."""

from collections.abc import Mapping
from typing import Any

from resilient_moe.report import checkers as checkers_lib
from resilient_moe.report.checkers import Checker, Value, Verdict
from resilient_moe.report.confined import confined
from resilient_moe.report.exactness import exactness
from resilient_moe.report.history import Event

CHECKERS: dict[str, Checker] = {
    "accounting": checkers_lib.accounting,
    "completeness": checkers_lib.completeness,
    "confined": confined,
    "epochs_monotone": checkers_lib.epochs_monotone,
    "exactness": exactness,
    "fencing": checkers_lib.fencing,
    "immutability": checkers_lib.immutability,
}

# Worst first: the overall verdict is the first of these that a checker gave.
_ORDER = (Value.FALSE, Value.UNKNOWN, Value.TOLERANCE, Value.TRUE)
VALID = (Value.TRUE, Value.TOLERANCE)


def check(
    checker: Checker, events: list[Event], twin: list[Event] | None
) -> Verdict:
  """One checker's verdict; a checker that crashes knows nothing."""
  try:
    return checker(events, twin)
  except Exception as error:  # noqa: BLE001
    return Verdict(
        Value.UNKNOWN, f"the checker crashed: {type(error).__name__}: {error}"
    )


def verdict(
    events: list[Event],
    twin: list[Event] | None = None,
    checkers: Mapping[str, Checker] | None = None,
) -> dict[str, Any]:
  """What the checkers say about a history.

  Args:
    events: the history.
    twin: the history of the same run without faults (policy `none`).
    checkers: which checkers to run, by name; default all.

  Returns:
    {"overall": value, "failed": [names of checkers that don't say true],
    "checkers": {name: {"value": ..., "reason": ...}}}, fit for JSON. Checkers
    that don't apply are left out of the overall verdict.
  """
  found = {
      name: check(checker, events, twin)
      for name, checker in sorted((checkers or CHECKERS).items())
  }
  values = {each.value for each in found.values()}
  overall = next((v for v in _ORDER if v in values), Value.UNKNOWN)
  passing = (*VALID, Value.NOT_APPLICABLE)
  return {
      "overall": str(overall),
      "failed": [n for n, each in found.items() if each.value not in passing],
      "checkers": {
          name: {"value": str(each.value), "reason": each.reason}
          for name, each in found.items()
      },
  }
