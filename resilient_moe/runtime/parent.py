"""A process ends with the one that started it, however that ended."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
  """Asks the kernel for SIGKILL when the parent is gone (Linux).

  It also ends a process that is stopped, which couldn't notice by itself.
  Elsewhere, and for all that isn't stopped, the end of the sockets does.
  """
  if sys.platform != "linux":
    return
  parent = os.getppid()
  ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # it ended before the kernel knew
    os.kill(os.getpid(), signal.SIGKILL)
