"""What processes that Headwater starts do first: they report on standard output, and end with their parent."""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading
from io import FileIO, RawIOBase
from pathlib import Path

EXIT_CRASHED = 1
EXIT_REFUSED = 2  # wrong arguments or an unusable model: a restart would not help
_PR_SET_PDEATHSIG = 1


def take_standard_output() -> RawIOBase:
    """Keep the real standard output for reports, and redirect later output to standard error."""
    reports = FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    return reports


def exit_with_parent(stream: RawIOBase, directory: Path | None = None) -> None:
    """Watch the parent's pipe in a thread; at its end remove the private directory and exit immediately."""

    def watch() -> None:
        while stream.read(4096):
            pass
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)  # the parent, which would do it, is dead
        os._exit(EXIT_CRASHED)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def die_with_parent(parent_pid: int) -> None:
    """Have the system kill this process, even a stopped one, when the thread that started it ends. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(EXIT_CRASHED)
