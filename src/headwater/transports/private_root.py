"""The private folder of a process in shared memory. The lock in it shows that the process lives."""

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path

_PREFIX = "headwater-weights-"
_LOCK = "lock"


def private_root(parent: Path) -> tuple[Path, int]:
    """A new folder for this process, and the lock that shows that the process lives."""
    _remove_left_over(parent)
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    new = parent / f".{name}"  # under its name only when it is locked: another server may be deleting what is not
    new.mkdir(mode=0o700)
    lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return new.rename(parent / name), lock


def _remove_left_over(parent: Path) -> None:
    """Delete the folders of this user's processes that were killed: their locks are free."""
    for root in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's folder, one in use, or one that is being deleted
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root, ignore_errors=True)
            finally:
                os.close(lock)
