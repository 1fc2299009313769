"""Redraws the figures of a work directory from its stored histories.

  python -m experiments.figures --workdir=DIR

Writes timeline.png and timeline.pdf (further scenarios: timeline-NAME).
"""

import sys
from collections.abc import Sequence

from experiments.table import parse_workdir
from resilient_moe import report


def launch(argv: Sequence[str]) -> int:
  """Does what a command line asks for; the exit status."""
  try:
    workdir, _ = parse_workdir(argv, __doc__)
    paths = report.timeline(workdir)
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  names = ", ".join(path.name for path in paths)
  print(f"In {workdir}: {names or 'no figure, because there was no fault'}")
  return 0


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
