"""Reads `TIMESTAMP,ContextTokens,GeneratedTokens` into records."""

import csv
import dataclasses
import datetime
import os
import pathlib

FILES = {
  "code": "AzureLLMInferenceTrace_code.csv",
  "conv": "AzureLLMInferenceTrace_conv.csv",
}
_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclasses.dataclass(frozen=True)
class Record:
  """One request of a trace."""

  arrival_s: float  # since the first request of the file
  context_tokens: int
  generated_tokens: int


def read(
  path: str | os.PathLike[str], limit: int | None = None
) -> tuple[Record, ...]:
  """The requests of a trace file, in order of arrival.

  Args:
    path: the CSV file.
    limit: read this many requests at most.

  Returns:
    One record a request; the first arrives at 0.
  """
  if limit is not None and limit < 0:
    raise ValueError(f"limit is {limit}; needed is an integer from 0, or None")
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(
      f"no trace at {str(path)!r}; the published files are "
      f"{', '.join(FILES.values())}"
    )
  records: list[Record] = []
  first: datetime.datetime | None = None
  with path.open(newline="", encoding="utf-8-sig") as file:
    rows = csv.reader(file)
    header = next(rows, [])
    if header != _HEADER:
      raise ValueError(
        f"{path.name}:1: the header is {','.join(header)!r}; "
        f"needed is {','.join(_HEADER)!r}"
      )
    for row in rows:
      if len(records) == limit:
        break
      where = f"{path.name}:{rows.line_num}"
      at, context, generated = _parse(where, row)
      first = first or at
      arrival_s = (at - first).total_seconds()
      if records and arrival_s < records[-1].arrival_s:
        raise ValueError(f"{where}: {row[0]} is earlier than the line before")
      records.append(Record(arrival_s, context, generated))
  return tuple(records)


def _parse(where: str, row: list[str]) -> tuple[datetime.datetime, int, int]:
  """The three values of a line."""
  if len(row) != len(_HEADER):
    raise ValueError(
      f"{where}: {len(row)} values; needed are {len(_HEADER)}: "
      f"{', '.join(_HEADER)}"
    )
  try:
    at = datetime.datetime.fromisoformat(row[0])
  except ValueError as error:
    raise ValueError(
      f"{where}: TIMESTAMP is {row[0]!r}; needed is a time like "
      "2023-11-16 18:17:03.9799600"
    ) from error
  if at.tzinfo is not None:
    raise ValueError(f"{where}: TIMESTAMP {row[0]!r} carries a time zone")
  return at, _tokens(where, 1, row), _tokens(where, 2, row)


def _tokens(where: str, column: int, row: list[str]) -> int:
  """A count of tokens."""
  text = row[column]
  if not (text.isascii() and text.isdigit()):
    raise ValueError(
      f"{where}: {_HEADER[column]} is {text!r}; needed is an integer from 0"
    )
  return int(text)
