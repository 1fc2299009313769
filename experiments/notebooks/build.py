"""Builds the notebooks from their sources, one Python file each.

  python -m experiments.notebooks.build

A source is Python with cells: `# %%` begins code, `# %% [markdown]` text (in
comments), `# %% [parameters]` the cell whose values a caller may replace, and
`# %% [file NAME]` a cell that is also written to a file of that name. What
comes before the first cell belongs to the source only. The notebooks have no
outputs; a test holds them equal to their sources.
"""

import json
import pathlib
import re
from typing import Any

HERE = pathlib.Path(__file__).parent
SOURCES = ("kill_a_rank", "write_your_own_policy", "which_policy_for_my_fleet")
_CELL = re.compile(
  r"^# %%(?: \[(markdown|parameters|file(?= )) ?([\w.]+)?\])?$"
)


def _markdown(lines: list[str]) -> str:
  return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def _cell(number: int, kind: str, name: str, lines: list[str]) -> Any:
  """A cell; its id is its number, so that rebuilding changes nothing."""
  common = {"id": f"cell-{number:02d}", "metadata": {}}
  text = "\n".join(lines).strip("\n")
  if kind == "markdown":
    text = _markdown(text.split("\n"))
    return {"cell_type": "markdown", **common, "source": _split(text)}
  if kind == "parameters":
    common["metadata"] = {"tags": ["parameters"]}
  if kind == "file":
    text = f"%%writefile {name}\n{text}"
  code: dict[str, Any] = {"execution_count": None, "outputs": []}
  return {"cell_type": "code", **common, **code, "source": _split(text)}


def _split(text: str) -> list[str]:
  return text.splitlines(keepends=True)


def notebook(source: str) -> dict[str, Any]:
  """The notebook of a source's text, as JSON.

  Raises:
    ValueError: a line looks like a cell's beginning and is none.
  """
  cells: list[Any] = []
  begun: tuple[str, str] | None = None
  lines: list[str] = []
  for line in [*source.splitlines(), "# %%"]:
    match = _CELL.match(line)
    if line.startswith("# %%") and not match:
      raise ValueError(
        f"{line!r}: choices: # %%, # %% [markdown], # %% [parameters],"
        " # %% [file NAME]"
      )
    if match is None:
      lines.append(line)
      continue
    if begun is not None:
      cells.append(_cell(len(cells), *begun, lines))
    begun, lines = (match[1] or "code", match[2] or ""), []
  spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
  return {
    "cells": cells,
    "metadata": {"kernelspec": spec, "language_info": {"name": "python"}},
    "nbformat": 4,
    "nbformat_minor": 5,
  }


def text_of(name: str) -> str:
  """What a notebook's file holds."""
  source = (HERE / f"{name}.py").read_text("utf-8")
  return json.dumps(notebook(source), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
  """Writes all notebooks."""
  for name in SOURCES:
    (HERE / f"{name}.ipynb").write_text(text_of(name), "utf-8")
    print(f"{name}.ipynb")


if __name__ == "__main__":
  main()
