"""A process ends with the one that started it, however that ended."""

import ctypes
import os
import signal
import sys

PARENT = "RMOE_PARENT"  # environment variable: who starts a process
_PR_SET_PDEATHSIG = 1


def as_parent() -> dict[str, str]:
  """What a process that is started must find in its environment."""
  return {PARENT: str(os.getpid())}


def die_with_parent() -> None:
  """Asks the kernel for SIGKILL when the parent is gone (Linux).

  It also ends a process that is stopped, which couldn't notice by itself.
  Elsewhere, and for all that isn't stopped, the end of the sockets does. A
  process that nobody here has started is left alone.
  """
  parent = os.environ.pop(PARENT, "")
  if sys.platform != "linux" or not parent:
    return
  ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != int(parent):  # it ended before the kernel knew
    os.kill(os.getpid(), signal.SIGKILL)
