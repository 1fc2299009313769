"""Shared libraries for probes and CPU kernels, compiled on first use."""

import pathlib
import subprocess
import tempfile
from collections.abc import Sequence


def compiled_once(
  path: pathlib.Path, command: Sequence[str], timeout_s: float
) -> None:
  """Lets `command`, which gets `-o FILE`, make the library unless it's there.

  Raises:
    OSError, subprocess.SubprocessError: it can't; nothing is left behind.
  """
  if path.exists():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  # Renamed when complete, so that a parallel build is never seen half done.
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    made = pathlib.Path(folder) / path.name
    subprocess.run(
      [*command, "-o", str(made)],
      check=True, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    made.replace(path)
