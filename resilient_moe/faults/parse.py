"""Faults from plain dicts, as configs and the library's callers write them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from resilient_moe.faults.check import RANKLESS_KINDS
from resilient_moe.faults.schedule import Fault, Schedule, check_ranks

_FIELDS = tuple(field.name for field in dataclasses.fields(Fault))


def parse_schedule(
  items: Iterable[Mapping[str, Any] | Fault], ranks: int
) -> Schedule:
  """Faults from `{"kind": "rank_lost", "ranks": [3], "at_step": 20}`.

  Args:
    items: dicts with the fields of `Fault`, or faults.
    ranks: how many ranks there are; others are refused.

  Returns:
    The schedule.
  """
  if isinstance(items, str | Mapping):
    raise ValueError(
      f"faults is {items!r}; needed is a list of dicts (for a named scenario "
      "call `scenario`)"
    )
  return check_ranks(
    tuple(_parse_fault(index, item) for index, item in enumerate(items)), ranks
  )


def _parse_fault(index: int, item: Mapping[str, Any] | Fault) -> Fault:
  """One fault; errors say which of the list it is."""
  if isinstance(item, Fault):
    return item
  try:
    fields = dict(item)
  except (TypeError, ValueError) as error:
    raise ValueError(f"fault {index} is {item!r}; needed is a dict") from error
  unknown = [name for name in fields if name not in _FIELDS]
  if unknown:
    raise ValueError(
      f"fault {index}: unknown field {unknown[0]!r}; "
      f"choose from {', '.join(_FIELDS)}"
    )
  if fields.get("kind") in RANKLESS_KINDS:
    fields.setdefault("ranks", ())
  for name in ("kind", "ranks"):
    if name not in fields:
      raise ValueError(f"fault {index}: {name!r} is missing in {fields!r}")
  if isinstance(fields["ranks"], list):
    fields["ranks"] = tuple(fields["ranks"])
  try:
    return Fault(**fields)
  except ValueError as error:
    raise ValueError(f"fault {index}: {error}") from error
