"""How pytest-xdist spreads the tests: file by file, what takes long first."""

from typing import Any

from xdist.scheduler import LoadScopeScheduling

# Engines of several processes tell each other by how soon they answer, so that
# only one worker at a time runs them.
TOGETHER = ("tests/runtime/process/",)
# Who waits at the end waits for a short one.
FIRST = (
  *TOGETHER, "tests/experiments/", "tests/runtime/", "tests/model/",
  "tests/mesh/", "tests/third_party/",
)  # fmt: skip


def unit(nodeid: str) -> str:
  """What one worker runs in one go: a file, for the sake of its fixtures."""
  file = nodeid.split("::", 1)[0]
  return next((part for part in TOGETHER if file.startswith(part)), file)


def order(nodeid: str) -> int:
  """The place of a test among the others; those of like places stay."""
  starts = [part for part in FIRST if nodeid.startswith(part)]
  return FIRST.index(starts[0]) if starts else len(FIRST)


class Scheduling(LoadScopeScheduling):
  """Gives units out in the order in which they were collected."""

  def __init__(self, config: Any, log: Any) -> None:
    config.option.loadscopereorder = False  # it would count, not weigh
    super().__init__(config, log)

  def _split_scope(self, nodeid: str) -> str:
    return unit(nodeid)
