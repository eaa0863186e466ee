"""Files of replaced weights, whose memory the next update uses again.

The system makes new pages of shared memory slower than a trainer sends: that costs three times as much as to write over
pages that exist. A trainer sends the same buckets again and again, so the files of the weights before last fit.
"""

import contextlib
import fcntl
import os
import signal
import stat
import threading
from pathlib import Path

_LEAST_BYTES = 1 << 20  # of a file that is worth keeping
_MOST_FILES = 256
_SLACK_BYTES = 1 << 20  # that a file may have beyond a bucket


class SpareFiles:
    """Files that no process reads any more, in a folder of their own. A bucket takes one and writes over it."""

    def __init__(self, folder: Path) -> None:
        """The folder is made with the first file."""
        self._folder = folder
        self._sizes: dict[Path, int] = {}
        self._num_offered = 0

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def offer(self, file: Path, *, most_bytes: int) -> bool:
        """Keep the file, unless there would be more than `most_bytes`, or another process has it open.

        It is moved first, so that no reader finds it afterwards. A refused file is where it was.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._num_offered += 1
        kept = self._folder / str(self._num_offered)
        try:
            size = file.lstat().st_size
            if not _LEAST_BYTES <= size <= most_bytes - self.num_bytes or len(self._sizes) >= _MOST_FILES:
                return False
            file.rename(kept)
        except OSError:
            return False
        if not _is_ours_alone(kept):
            kept.rename(file)
            return False
        self._sizes[kept] = size
        return True

    def take(self, num_bytes: int, to: Path) -> int:
        """Move the file that fits a bucket best to `to`, and return its size. 0: none fits."""
        fitting = [(size, path) for path, size in self._sizes.items() if size <= num_bytes + _SLACK_BYTES]
        if not fitting:
            return 0
        size, path = max(fitting, key=lambda each: each[0])
        del self._sizes[path]
        path.rename(to)
        return size

    def clear(self) -> None:
        """Free the memory. It is a thread that does: 16 GB take a second."""
        paths, self._sizes = list(self._sizes), {}
        if paths:
            threading.Thread(target=_unlink, args=(paths,), name="free-spare", daemon=True).start()


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # the whole area was deleted meanwhile
            path.unlink()


def _is_ours_alone(path: Path) -> bool:
    """Whether the file has all its pages and one name, and no other process has it open or mapped.

    The kernel gives a write lease for such a file only: https://man7.org/linux/man-pages/man2/F_SETLEASE.2const.html
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_blocks * 512 < found.st_size:
            return False
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # who opens the file now sends it; SIGIO would end us
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
