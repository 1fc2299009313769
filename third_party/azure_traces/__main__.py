"""Prints the statistics of the published traces in a folder, as JSON."""

import json
import pathlib
import re
import sys
from collections.abc import Sequence

from third_party.azure_traces import ATTRIBUTION, FILES, read, statistics


def main(argv: Sequence[str]) -> int:
  """What ships is what this prints."""
  if len(argv) != 2:
    print("usage: python -m third_party.azure_traces DIR", file=sys.stderr)
    return 2
  folder = pathlib.Path(argv[1])
  found = {
    name: statistics(read(folder / file)) for name, file in FILES.items()
  }
  text = json.dumps({"attribution": ATTRIBUTION, "traces": found}, indent=1)
  # A pair on a line of its own is enough.
  print(re.sub(r"\[\s+([\d.e+-]+),\s+([\d.e+-]+)\s+\]", r"[\1, \2]", text))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
