"""What a child process does so that it never outlives its parent."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, by: signal.Signals) -> None:
    """Lets the system send this process a signal when the thread that started it ends,
    even while it hangs; Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)
    require_parent(parent)  # it may have ended before


def require_parent(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)
